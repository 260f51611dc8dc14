"""The image text encoder as a measure of likeness."""

import torch
from torch.nn.functional import avg_pool2d
from transformers import CLIPVisionModelWithProjection

from ldm.checkpoints.formats import PICTO_PATH
from ldm.picto.clip import load_image_encoder

FOLDER = PICTO_PATH / "image_encoder"


def test_an_image_becomes_the_direction_of_what_transformers_makes_of_it():
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(FOLDER)(pictures).image_embeds
    found = load_image_encoder(FOLDER)(pictures)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))


def test_larger_images_are_reduced_by_averages():
    see, pictures = load_image_encoder(FOLDER), torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(see(pictures), see(avg_pool2d(pictures, 2)))
