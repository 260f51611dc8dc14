"""A tiny random model in the directory layout, and a pipeline on it: what most tests draw with."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread costs more in barriers than it gains

os.environ["XDG_CONFIG_HOME"] = os.devnull  # no defaults of who runs the tests

import pytest
import torch

from ldm import cli
from ldm.checkpoints.formats import MODEL_INDEX
from ldm.checkpoints.schedule import build_scheduler_config
from ldm.checkpoints.tensors import save_module
from ldm.files import write_json
from ldm.nn import vae
from ldm.nn.tokenizer import save_clip_tokenizer
from ldm.nn.unet import UNet, UNetConfig
from ldm.picto import clip
from ldm.pipeline.pipeline import Pipeline

VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "mid_block_add_attention": False,
    "scaling_factor": 0.5,
}
CAPTIONS = ["a red apple on a blue background", "two stars", "a cat to the left of a dog"]


@pytest.fixture
def vae_config():
    return VAE


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model folder: latents of 4 channels, a quarter of the image's side; v-prediction; native size 32."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tokenizer = clip.train_tokenizer(CAPTIONS * 10, 600, 16)
    save_clip_tokenizer(tokenizer, folder / "tokenizer")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    both = clip.build_clip(tower, {**tower, "image_size": 32, "patch_size": 8}, 16, tokenizer)
    text_encoder = clip.split_clip(both)["text_encoder"]
    save_module(text_encoder, text_encoder.config.to_diff_dict(), folder / "text_encoder", "model.safetensors")
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    save_module(UNet(config), config.to_dict(), folder / "unet")
    autoencoder = vae.build_vae(VAE)
    save_module(autoencoder, autoencoder.config.to_dict(), folder / "vae")
    (folder / "scheduler").mkdir()
    write_json(build_scheduler_config("squaredcos_cap_v2", "v"), folder / "scheduler" / "scheduler_config.json")
    write_json({"num_inference_steps": 6, "guidance_scale": 3.0}, folder / "generation_config.json")
    write_json(MODEL_INDEX, folder / "model_index.json")
    return folder


@pytest.fixture(scope="session")
def pipe(tiny):
    return Pipeline.from_pretrained(tiny, device="cpu", dtype="float32")


@pytest.fixture
def ldm_(monkeypatch, capsys):
    """(exit status, stdout, stderr) of `ldm WORDS...`, in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ldm", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(ldm_):
    """Asserts that `ldm WORDS...` is refused: status 2, nothing on stdout, one `error:` line with `said` in it."""

    def run(*words, said=""):
        status, out, err = ldm_(*words)
        assert status == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err

    return run
