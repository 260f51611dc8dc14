import ldm.nn  # noqa: F401  before peft: it works around a mismatched torchvision
