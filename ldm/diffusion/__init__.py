"""The mathematics: one variance-preserving SDE, its denoiser, its samplers and its training objective."""
