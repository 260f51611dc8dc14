"""What people paste from diffusers' documentation: (where it begins, the lines, what is to happen).

"=": its `image` (or `images`) are diffusers' own to 1 of 255; "": it runs, and what it asserts holds; any other text is
part of an error, which names what to write instead.
"""
# ruff: noqa: E501

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
XL = "stabilityai/stable-diffusion-xl-base-1.0"
INPAINT = "stable-diffusion-v1-5/stable-diffusion-inpainting"
PREAMBLES = {
    "": "",
    "sd": f"""from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("{SD}", torch_dtype=torch.float16)
pipe = pipe.to("cuda")
pipeline = pipe""",
    "xl": f"""from diffusers import StableDiffusionXLPipeline
pipe = StableDiffusionXLPipeline.from_pretrained("{XL}", torch_dtype=torch.float16, variant="fp16", use_safetensors=True)
pipe = pipe.to("cuda")
pipeline = pipe""",
    "img2img": f"""from diffusers import StableDiffusionImg2ImgPipeline
pipe = StableDiffusionImg2ImgPipeline.from_pretrained("{SD}", torch_dtype=torch.float16).to("cuda")
from diffusers.utils import load_image
init_image = load_image("https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/cat.png")""",
    "inpaint": f"""from diffusers import StableDiffusionInpaintPipeline
pipe = StableDiffusionInpaintPipeline.from_pretrained("{INPAINT}", torch_dtype=torch.float16).to("cuda")
from diffusers.utils import load_image
init_image = load_image("https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/inpaint.png")
mask_image = load_image("https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/mask.png")""",
}
PROMPT = 'prompt = "a photo of an astronaut riding a horse on mars"\n'
GENERATOR = 'generator = torch.Generator("cpu").manual_seed(31)\n'
CALL = "image = pipe(prompt, generator=generator).images[0]"
RUN = PROMPT + GENERATOR + CALL


def lines(where, outcome, *rows):
    return [(where, row, outcome) for row in rows]


LOADING = [
    *lines(
        "",
        "=",
        f"""from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{SD}", use_safetensors=True)
pipe.to("cuda")
{RUN}""",
        f"""from diffusers import AutoPipelineForText2Image
pipe = AutoPipelineForText2Image.from_pretrained("{SD}", torch_dtype=torch.float16, variant="fp16").to("cuda")
{RUN}""",
        f"""from diffusers import AutoPipelineForText2Image
pipe = AutoPipelineForText2Image.from_pretrained("{XL}", torch_dtype=torch.float16, use_safetensors=True).to("cuda")
{RUN}""",
        f"""from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("{SD}", safety_checker=None, requires_safety_checker=False)
{RUN}""",
        f"""from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("{SD}", local_files_only=True, low_cpu_mem_usage=True)
{RUN}""",
        f"""from diffusers import StableDiffusionPipeline, EulerDiscreteScheduler
scheduler = EulerDiscreteScheduler.from_pretrained("{SD}", subfolder="scheduler")
pipe = StableDiffusionPipeline.from_pretrained("{SD}", scheduler=scheduler)
{RUN}""",
        f"""from diffusers import StableDiffusionPipeline, AutoencoderKL
vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse", torch_dtype=torch.float16)
pipe = StableDiffusionPipeline.from_pretrained("{SD}", vae=vae, torch_dtype=torch.float16).to("cuda")
{RUN}""",
        f"""from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("{SD}")
pipe.save_pretrained("./saved")
pipe = StableDiffusionPipeline.from_pretrained("./saved", use_safetensors=True)
{RUN}""",
        f"""from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("{SD}")
pipe.save_pretrained("./half", variant="fp16", safe_serialization=True)
pipe = StableDiffusionPipeline.from_pretrained("./half", variant="fp16")
{RUN}""",
        f"""from diffusers import StableDiffusionPipeline, StableDiffusionImg2ImgPipeline
pipe = StableDiffusionPipeline.from_pretrained("{SD}")
pipe = StableDiffusionImg2ImgPipeline(**pipe.components)
init_image = PIL.Image.new("RGB", (64, 64), "red")
{PROMPT}{GENERATOR}image = pipe(prompt, image=init_image, generator=generator).images[0]""",
        f"""from diffusers import AutoPipelineForText2Image, AutoPipelineForImage2Image
pipe = AutoPipelineForText2Image.from_pretrained("{SD}", torch_dtype=torch.float16).to("cuda")
pipe = AutoPipelineForImage2Image.from_pipe(pipe)
init_image = PIL.Image.new("RGB", (64, 64), "red")
{PROMPT}{GENERATOR}image = pipe(prompt, image=init_image, strength=0.6, generator=generator).images[0]""",
    ),
    *lines(
        "",
        "",
        f"""from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("{SD}", device_map="balanced")
image = pipe("a cat").images[0]""",
        f"""from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{SD}", device_map="auto", max_memory={{0: "1GB", 1: "1GB"}})
pipe("a cat").images[0].save("cat.png")""",
        f"""from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{SD}", torch_dtype=torch.float16)
assert pipe.device.type == "cpu" and pipe.dtype == torch.float32
assert list(pipe.components)[:2] and "unet" in pipe.components and pipe.config["_class_name"]""",
    ),
    (
        "",
        f"""from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained("{SD}", custom_pipeline="lpw_stable_diffusion")""",
        "prompts may be of any length",
    ),
    (
        "",
        f"""from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("{SD}", cache_dir="./cache")""",
        "HF_HOME",
    ),
]

TEXT_TO_IMAGE = [
    *lines(
        "sd",
        "=",
        RUN,
        PROMPT + "generator = torch.manual_seed(0)\n" + CALL,
        PROMPT + "torch.manual_seed(0)\nimage = pipe(prompt).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, guidance_scale=3.5, generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt=prompt, num_inference_steps=50, generator=generator)[0][0]",
        PROMPT + GENERATOR + 'image = pipe(prompt, negative_prompt="ugly, deformed", generator=generator).images[0]',
        PROMPT + GENERATOR + "image = pipe(prompt, height=512, width=768, generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, 40, 48, generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, 40, 48, 4, guidance_scale=2.0, generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, guidance_scale=0.0, generator=generator).images[0]",
        PROMPT
        + GENERATOR
        + "image = pipe(prompt, guidance_scale=7.5, guidance_rescale=0.7, generator=generator).images[0]",
        PROMPT + GENERATOR + "images = pipe(prompt, num_images_per_prompt=2, generator=generator).images",
        GENERATOR + 'images = pipe(["a cat", "a dog"], generator=generator).images',
        PROMPT + "generator = [torch.Generator('cpu').manual_seed(i) for i in range(3)]\n"
        "images = pipe([prompt] * 3, generator=generator).images",
        PROMPT + "generator = [torch.Generator(device='cuda').manual_seed(i) for i in range(2)]\n"
        "images = pipe(prompt, num_images_per_prompt=2, generator=generator).images",
        GENERATOR + 'images = pipe(["a cat", "a dog"], negative_prompt=["rain", ""], generator=generator).images',
        PROMPT + GENERATOR + 'image = pipe(prompt, generator=generator, output_type="np").images[0]',
        PROMPT + GENERATOR + 'image = pipe(prompt, generator=generator, output_type="pt").images[0].permute(1, 2, 0)',
        PROMPT + GENERATOR + "image = pipe(prompt, generator=generator, return_dict=False)[0][0]",
        PROMPT + GENERATOR + "images, has_nsfw_concept = pipe(prompt, generator=generator, return_dict=False)",
        PROMPT + GENERATOR + 'image = pipe(prompt, generator=generator)["images"][0]',
        PROMPT + GENERATOR + CALL + "\n" + CALL,  # the second image of a generator
        PROMPT + "generator = torch.Generator().manual_seed(2**40 + 5)\n" + CALL,
        PROMPT + GENERATOR + "latents = torch.randn((1, 4, 8, 8), generator=generator)\n"
        "image = pipe(prompt, latents=latents).images[0]",
        PROMPT
        + GENERATOR
        + """latents = pipe(prompt, output_type="latent", generator=generator).images
with torch.no_grad():
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]""",
        PROMPT + GENERATOR + "image = pipe(prompt, eta=0.0, generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, generator=generator, clip_skip=None).images[0]",
        GENERATOR + "embeds, negative = pipe.encode_prompt('a cat', 'cuda', 1, True)\n"
        "image = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, generator=generator).images[0]",
        GENERATOR + "embeds, negative = pipe.encode_prompt('a cat', device='cuda', num_images_per_prompt=1, "
        "do_classifier_free_guidance=True, negative_prompt='a dog')\n"
        "image = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, generator=generator).images[0]",
        GENERATOR + "embeds, _ = pipe.encode_prompt(['a cat', 'a dog'], 'cuda', 1, False)\n"
        "images = pipe(prompt_embeds=embeds, generator=generator).images",
        GENERATOR
        + """ids = pipe.tokenizer("a cat", padding="max_length", max_length=pipe.tokenizer.model_max_length,
                     truncation=True, return_tensors="pt").input_ids
embeds = pipe.text_encoder(ids)[0]
image = pipe(prompt_embeds=embeds, guidance_scale=1.0, generator=generator).images[0]""",
    ),
    *lines(
        "sd",
        "",
        "image = pipe('a cat').images[0]\nimage.save('cat.png')",
        "result = pipe('a cat')\nassert not result.nsfw_content_detected\nassert len(result.images) == 1",
        "torch.manual_seed(1)\na = pipe('a cat').images[0]\nb = pipe('a cat').images[0]\nassert a.tobytes() != b.tobytes()",
        PROMPT + "from diffusers.utils import make_image_grid\n"
        "images = pipe([prompt] * 4).images\ngrid = make_image_grid(images, rows=2, cols=2)\nassert grid.width == 64",
        "images = pipe(['a cat', 'a dog'], guidance_scale=[2.0, 7.5]).images\nassert len(images) == 2",
        "latents = pipe('a cat', output_type='latent').images\nassert latents.shape == (1, 4, 8, 8)",
        PROMPT + "with torch.inference_mode():\n    image = pipe(prompt).images[0]",
        "pipe.set_progress_bar_config(disable=True)\npipe('a cat')",
        "output = pipe('a cat', generator=torch.Generator().manual_seed(31))\nassert output.seeds == [31]\n"
        "assert pipe('a cat', seed=31).images[0].tobytes() == output.images[0].tobytes()",
        "assert pipe('a cat')._repr_png_()[:4] == b'\\x89PNG'",
    ),
    ("sd", "pipe('a cat', ip_adapter_image=None, cross_attention_kwargs={'gligen': 1})", "only scale"),
]

SDXL = [
    *lines(
        "xl",
        "=",
        RUN,
        PROMPT + GENERATOR + 'image = pipe(prompt=prompt, negative_prompt="blurry", generator=generator).images[0]',
        PROMPT + GENERATOR + 'image = pipe(prompt, prompt_2="Van Gogh painting", generator=generator).images[0]',
        PROMPT + GENERATOR + 'image = pipe(prompt, prompt_2="oil", negative_prompt="a", negative_prompt_2="b", '
        "generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, original_size=(1024, 1024), target_size=(512, 512), "
        "crops_coords_top_left=(256, 0), generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt=prompt, negative_original_size=(512, 512), "
        "negative_crops_coords_top_left=(0, 0), negative_target_size=(1024, 1024), generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, None, 40, 48, generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, return_dict=False, generator=generator)[0][0]",
        PROMPT
        + GENERATOR
        + """(prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds,
 negative_pooled_prompt_embeds) = pipe.encode_prompt(prompt, device="cuda", do_classifier_free_guidance=True)
image = pipe(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
             pooled_prompt_embeds=pooled_prompt_embeds, negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
             generator=generator).images[0]""",
        PROMPT
        + GENERATOR
        + """embeds, negative, pooled, negative_pooled = pipe.encode_prompt(prompt, "an oil painting",
    "cuda", 1, True, negative_prompt="rain")
image = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled,
             negative_pooled_prompt_embeds=negative_pooled, generator=generator).images[0]""",
        PROMPT
        + GENERATOR
        + """latents = pipe(prompt, denoising_end=0.5, output_type="latent", generator=generator).images
from diffusers import StableDiffusionXLImg2ImgPipeline
refiner = StableDiffusionXLImg2ImgPipeline(**pipe.components)
image = refiner(prompt=prompt, denoising_start=0.5, image=latents).images[0]""",
        PROMPT
        + GENERATOR
        + """latents = pipe(prompt=prompt, output_type="latent", generator=generator).images[0]
from diffusers import AutoPipelineForImage2Image
refiner = AutoPipelineForImage2Image.from_pipe(pipe)
image = refiner(prompt=prompt, image=latents[None, :], strength=0.5, generator=generator).images[0]""",
        PROMPT
        + GENERATOR
        + """from diffusers import AutoPipelineForImage2Image
pipe = AutoPipelineForImage2Image.from_pipe(pipe)
init_image = PIL.Image.new("RGB", (48, 48), "blue")
image = pipe(prompt, image=init_image, strength=0.8, guidance_scale=10.5, generator=generator).images[0]""",
    ),
    *lines(
        "xl",
        "",
        "assert pipe.text_encoder_2.config.projection_dim == 24 and pipe.tokenizer_2 is not None",
        "pipe.upcast_vae()\nimage = pipe('a cat').images[0]",
        "image = pipe('a cat', num_inference_steps=2, guidance_scale=0.0).images[0]",
    ),
    ("xl", "pipe('a cat', aesthetic_score=6.0)", "refiner is not supported"),
    ("xl", "pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)", "guidance_rescale"),
]

IMAGE_TO_IMAGE = [
    *lines(
        "img2img",
        "=",
        PROMPT + GENERATOR + "image = pipe(prompt=prompt, image=init_image, strength=0.75, guidance_scale=7.5, "
        "generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, image=init_image, generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, init_image, 0.5, generator=generator).images[0]",
        PROMPT + GENERATOR + "init_image = init_image.convert('RGB').resize((768, 512))\n"
        "image = pipe(prompt, image=init_image, strength=0.5, generator=generator).images[0]",
        PROMPT + "generator = torch.Generator(device='cuda').manual_seed(1024)\n"
        "images = pipe([prompt] * 2, image=[init_image] * 2, generator=generator).images",
        PROMPT
        + GENERATOR
        + "images = pipe(prompt, image=init_image, num_images_per_prompt=2, generator=generator).images",
        PROMPT + "generator = [torch.Generator().manual_seed(i) for i in range(2)]\n"
        "images = pipe([prompt] * 2, image=init_image, generator=generator).images",
        PROMPT + GENERATOR + "init = torch.from_numpy(np.array(init_image) / 255).permute(2, 0, 1)[None].float()\n"
        "image = pipe(prompt, image=init, generator=generator).images[0]",
        PROMPT
        + GENERATOR
        + "image = pipe(prompt, image=np.array(init_image)[None] / 255, generator=generator).images[0]",
    ),
    ("img2img", "image = pipe('a cat', image=init_image.convert('RGBA')).images[0]", ""),
    ("img2img", "init_image.save('in.png')\nimage = pipe('a cat', image='in.png').images[0]", ""),
]

INPAINTING = [
    *lines(
        "inpaint",
        "=",
        PROMPT + GENERATOR + "image = pipe(prompt=prompt, image=init_image, mask_image=mask_image, "
        "generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, image=init_image, mask_image=mask_image, strength=0.8, "
        "guidance_scale=3.0, generator=generator).images[0]",
        PROMPT + GENERATOR + "image = pipe(prompt, init_image, mask_image, generator=generator).images[0]",
        PROMPT
        + GENERATOR
        + "mask_image = torch.from_numpy(np.array(mask_image.convert('L')) / 255)[None, None].float()\n"
        "init = torch.from_numpy(np.array(init_image) / 255).permute(2, 0, 1)[None].float()\n"
        "image = pipe(prompt, image=init, mask_image=mask_image, generator=generator).images[0]",
        PROMPT + GENERATOR + "images = pipe(prompt, image=init_image, mask_image=mask_image, num_images_per_prompt=2, "
        "generator=generator).images",
    ),
    (
        "",
        f"""from diffusers import AutoPipelineForInpainting
pipe = AutoPipelineForInpainting.from_pretrained("{INPAINT}", torch_dtype=torch.float16, variant="fp16").to("cuda")
init_image, mask_image = PIL.Image.new("RGB", (64, 64)), PIL.Image.new("L", (64, 64), 255)
{PROMPT}{GENERATOR}image = pipe(prompt, image=init_image, mask_image=mask_image, generator=generator).images[0]""",
        "=",
    ),
    ("inpaint", "pipe('a cat', image=init_image, mask_image=mask_image, padding_mask_crop=32)", "crop image and mask"),
]

SCHEDULERS = [
    *lines(
        "sd",
        "=",
        *(
            f"from diffusers import {name}\npipe.scheduler = {name}.from_config(pipe.scheduler.config{options})\n{RUN}"
            for name, options in (
                ("DDIMScheduler", ""),
                ("DDIMScheduler", ', timestep_spacing="trailing"'),
                ("EulerDiscreteScheduler", ""),
                ("LMSDiscreteScheduler", ""),
                ("DPMSolverMultistepScheduler", ', final_sigmas_type="zero"'),
                ("DPMSolverMultistepScheduler", ', final_sigmas_type="zero", timestep_spacing="trailing"'),
            )
        ),
        "from diffusers import DPMSolverMultistepScheduler\npipe.scheduler = DPMSolverMultistepScheduler.from_config("
        f"pipe.scheduler.config, use_karras_sigmas=True)\n{PROMPT}{GENERATOR}"
        "image = pipe(prompt, num_inference_steps=9, generator=generator).images[0]",
        "from diffusers import DDIMScheduler\npipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, "
        f'rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")\n{RUN}',
    ),
    *lines(
        "sd",
        "",
        *(
            f"from diffusers import {name}\npipe.scheduler = {name}.from_config(pipe.scheduler.config{options})\n"
            f"image = pipe('a cat').images[0]\nassert type(pipe.scheduler).__name__ == '{name}'"
            for name, options in (
                ("EulerAncestralDiscreteScheduler", ""),
                ("HeunDiscreteScheduler", ""),
                ("DPMSolverSinglestepScheduler", ""),
                ("UniPCMultistepScheduler", ""),
                ("DEISMultistepScheduler", ""),
                ("PNDMScheduler", ""),
                ("KDPM2DiscreteScheduler", ""),
                ("KDPM2AncestralDiscreteScheduler", ""),
                ("DPMSolverMultistepScheduler", ', algorithm_type="sde-dpmsolver++"'),
                ("DDPMScheduler", ""),
            )
        ),
        "assert pipe.scheduler.config['beta_start'] == 0.00085 == pipe.scheduler.config.beta_start",
        "assert len(pipe.scheduler.compatibles) > 5\nprint(pipe.scheduler)",
        "import diffusers as theirs\n"
        "pipe.scheduler = theirs.EulerDiscreteScheduler.from_config(pipe.scheduler.config)\n"
        "assert pipe.model.generation_defaults['sampler'] == 'euler'\nimage = pipe('a cat').images[0]",
        "image = pipe('a cat', timesteps=[999, 700, 400, 100]).images[0]",
        "image = pipe('a cat', sigmas=[14.6, 6.3, 2.1, 0.7, 0.0]).images[0]",
    ),
    (
        "sd",
        "from diffusers import EulerDiscreteScheduler\npipe.scheduler = EulerDiscreteScheduler()",
        "EulerDiscreteScheduler.from_config(pipe.scheduler.config)",
    ),
    ("sd", "from diffusers import FlowMatchEulerDiscreteScheduler", "ldm.compat has no"),
]

LORA = [
    *lines(
        "sd",
        "=",
        f'pipe.load_lora_weights("sayakpaul/sd-model-finetuned-lora-t4")\n{RUN}',
        f'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors", adapter_name="pixel")\n{RUN}',
        f'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors", adapter_name="pixel")\n'
        f'pipe.set_adapters("pixel", adapter_weights=0.5)\n{RUN}',
        'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors")\n'
        + PROMPT
        + GENERATOR
        + 'image = pipe(prompt, cross_attention_kwargs={"scale": 0.5}, generator=generator).images[0]',
        'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors", adapter_name="pixel")\n'
        'pipe.load_lora_weights("CiroN2022/toy-face", weight_name="toy.safetensors", adapter_name="toy")\n'
        f'pipe.set_adapters(["pixel", "toy"], adapter_weights=[0.5, 1.0])\n{RUN}',
        'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors", adapter_name="pixel")\n'
        'pipe.load_lora_weights("CiroN2022/toy-face", weight_name="toy.safetensors", adapter_name="toy")\n'
        f'pipe.set_adapters("toy")\n{RUN}',
        'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors")\n'
        f"pipe.fuse_lora(lora_scale=0.7)\npipe.unload_lora_weights()\n{RUN}",
        f'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors")\n'
        f"pipe.unload_lora_weights()\n{RUN}",
        f'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors")\npipe.disable_lora()\n{RUN}',
        'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors")\n'
        f"pipe.disable_lora()\npipe.enable_lora()\n{RUN}",
        'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors", adapter_name="pixel")\n'
        'pipe.load_lora_weights("CiroN2022/toy-face", weight_name="toy.safetensors", adapter_name="toy")\n'
        f'pipe.delete_adapters("toy")\npipe.set_adapters("pixel")\n{RUN}',
        "from safetensors.torch import load_file\nstate_dict = load_file(LORA_FILE)\n"
        f"pipe.load_lora_weights(state_dict)\n{RUN}",
    ),
    *lines(
        "sd",
        "",
        'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors", adapter_name="pixel")\n'
        'assert pipe.get_active_adapters() == ["pixel"] and pipe.get_list_adapters()["unet"] == ["pixel"]',
        'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors", adapter_name="pixel")\n'
        'pipe.set_adapters("pixel", {"unet": 0.5})\npipe.set_lora_device(["pixel"], device="cpu")\npipe("a cat")',
        'pipe.load_lora_weights("artificialguybr/pixel", weight_name="pixel.safetensors", adapter_name="pixel")\n'
        "pipe.fuse_lora(lora_scale=0.7)\npipe.unfuse_lora()\nassert pipe.get_active_adapters() == ['pixel']",
        'pipe.load_textual_inversion("sd-concepts-library/cat-toy")\nimage = pipe("a <cat-toy> on a hill").images[0]',
        'pipe.load_textual_inversion("sd-concepts-library/cat-toy", token="<mine>")\n'
        'image = pipe("a <mine> on a hill", negative_prompt="rain").images[0]\npipe.unload_textual_inversion()',
        'pipe.load_textual_inversion("EvilEngine/badhandv4", weight_name="learned_embeds.safetensors", token="badhand")\n'
        'image = pipe("a cat", negative_prompt="badhand").images[0]\npipe.unload_textual_inversion("badhand")',
    ),
    ("sd", 'pipe.set_adapters("toy", {"unet": {"down": 0.9, "mid": 1.0}})', "weights of blocks"),
    ("sd", 'pipe.load_ip_adapter("h94/IP-Adapter", subfolder="models")', "IP-Adapter"),
]

CALLBACKS = [
    *lines(
        "sd",
        "=",
        """def latents_callback(pipe, step, timestep, callback_kwargs):
    latents = callback_kwargs["latents"]
    steps.append((int(step), int(timestep), tuple(latents.shape)))
    return callback_kwargs
steps = []
"""
        + PROMPT
        + GENERATOR
        + """image = pipe(prompt, generator=generator, callback_on_step_end=latents_callback,
             callback_on_step_end_tensor_inputs=["latents"]).images[0]
assert [step for step, *_ in steps] == [0, 1, 2, 3] and steps[0][2] == (1, 4, 8, 8), steps""",
        """def interrupt_callback(pipeline, i, t, callback_kwargs):
    stop_idx = 1
    if i == stop_idx:
        pipeline._interrupt = True
    return callback_kwargs
"""
        + PROMPT
        + GENERATOR
        + "image = pipe(prompt, callback_on_step_end=interrupt_callback, generator=generator).images[0]",
        """def scale_callback(pipe, step, timestep, callback_kwargs):
    callback_kwargs["latents"] = callback_kwargs["latents"] * 1.01
    return callback_kwargs
"""
        + PROMPT
        + GENERATOR
        + "image = pipe(prompt, callback_on_step_end=scale_callback, generator=generator).images[0]",
    ),
    (
        "sd",
        "seen = []\npipe('a cat', callback=lambda step, timestep, latents: seen.append(step), callback_steps=2)\n"
        "assert seen == [0, 2]",
        "",
    ),
    (
        "sd",
        "def stop(pipe, step, timestep, kwargs):\n    raise KeyboardInterrupt\n"
        "try:\n    pipe('a cat', callback_on_step_end=stop)\nexcept KeyboardInterrupt:\n    pass\nelse:\n    assert False\n"
        "pipe('a cat')",
        "",
    ),
    (
        "sd",
        "def dynamic(pipe, step_index, timestep, callback_kwargs):\n"
        "    assert pipe.num_timesteps == 4 and pipe.guidance_scale == 7.5\n    return callback_kwargs\n"
        "pipe('a cat', callback_on_step_end=dynamic)",
        "",
    ),
    (
        "sd",
        """def callback_dynamic_cfg(pipe, step_index, timestep, callback_kwargs):
    if step_index == int(pipe.num_timesteps * 0.5):
        callback_kwargs['prompt_embeds'] = callback_kwargs['prompt_embeds'].chunk(2)[-1]
        pipe._guidance_scale = 0.0
    return callback_kwargs
pipe('a cat', callback_on_step_end=callback_dynamic_cfg, callback_on_step_end_tensor_inputs=['prompt_embeds'])""",
        "guidance_interval",
    ),
]

MEMORY = [
    *lines(
        "sd",
        "=",
        *(
            f"{line}\n{RUN}"
            for line in (
                "pipe.enable_attention_slicing()",
                "pipe.enable_attention_slicing('max')",
                "pipe.disable_attention_slicing()",
                "pipe.vae.enable_tiling()",
                "pipe.vae.enable_slicing()",
                "pipe.safety_checker = None",
                "pipe.unet.to(memory_format=torch.channels_last)",
                "pipe.unet.eval()",
                "pipe.fuse_qkv_projections()",
                "pipe.set_progress_bar_config(desc='images', leave=False)",
                "pipe.to('cuda', torch.float16)",
                "pipe.to(torch.float16)",
                "pipe.to(torch_dtype=torch.float16, device='cuda')",
            )
        ),
        f"import copy\npipe = copy.deepcopy(pipe)\n{RUN}",
    ),
    *lines(
        "sd",
        "",
        "before = pipe('a cat', seed=3).images[0]\npipe.unet = torch.compile(pipe.unet, backend='eager')\n"
        "assert pipe('a cat', seed=3).images[0].tobytes() == before.tobytes()",
        "pipe.enable_vae_slicing()\nimage = pipe('a cat').images[0]",
        "pipe.enable_vae_tiling()\nimage = pipe('a cat').images[0]",
        "pipe.enable_model_cpu_offload()\nimage = pipe('a cat').images[0]",
        "pipe.enable_sequential_cpu_offload()\nimage = pipe('a cat').images[0]",
        "pipe.enable_xformers_memory_efficient_attention()\nimage = pipe('a cat').images[0]",
        "pipe.disable_xformers_memory_efficient_attention()\npipe.disable_vae_slicing()\npipe.disable_vae_tiling()",
        "import pickle\ncopied = pickle.loads(pickle.dumps(pipe))\nassert type(copied) is type(pipe)",
        "pipe.maybe_free_model_hooks()\npipe.remove_all_hooks()",
        "assert pipe.unet.config.in_channels == 4 and pipe.vae_scale_factor == 4 and pipe.vae.config.scaling_factor == 3",
    ),
]

MISTAKES = [
    ("sd", "pipe(5)", "prompt 5: must be text"),
    ("sd", "pipe('a cat', True)", "height 1: must be a multiple"),
    ("sd", "pipe('a cat', generator=5)", "must be a torch.Generator"),
    ("sd", "pipe('a cat', timesteps=5)", "timesteps 5: must be a list"),
    ("sd", "pipe('a cat', output_type='gif')", "choose from pil, np, pt, latent"),
    ("sd", "pipe(['a', 'b'], guidance_scale=[1.0])", "1 given for 2 prompts"),
    ("sd", "pipe('a cat', seed='5')", "seed '5': must be a whole number"),
    ("sd", "pipe('a cat', mask=3, mask_image=3)", "mask is given twice"),
    ("img2img", "pipe('a cat', image='https://x.org/y.png')", "load_image"),
    ("sd", f'StableDiffusionPipeline.from_pretrained("{SD}", vae=pipe.vae)', "loaded from no file"),
    (
        "",
        f"""from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained("{SD}", torch_dytpe=torch.float16)""",
        "did you mean 'torch_dtype'?",
    ),
    ("", "from diffusers import StableDiffusionPipelin", "did you mean 'StableDiffusionPipeline'?"),
    ("sd", "pipe('a cat', num_inference_step=20)", "did you mean 'num_inference_steps'?"),
    ("sd", "pipe('a cat', guidance=7)", "did you mean 'guidance_scale'?"),
    ("sd", "pipe()", "prompt: one is needed"),
    ("img2img", "pipe('a cat', image=init_image, strengh=0.5)", "did you mean 'strength'?"),
    ("inpaint", "pipe('a cat')", "needs an image and a mask"),
    ("sd", "pipe.scheduler = 'euler'", "sampler=..., spacing=..."),
    ("sd", 'pipe.load_lora_weights("CiroN2022/toy-face", weight_nam="toy.safetensors")', "did you mean 'weight_name'?"),
    ("sd", "pipe.unet = torch.nn.Linear(2, 2)", "only torch.compile(pipe.unet) can be assigned"),
    ("sd", "pipe.enable_atention_slicing()", "did you mean 'enable_attention_slicing'?"),
    ("sd", "pipe.schedular = 3", "did you mean 'scheduler'?"),
]

SNIPPETS = [
    *LOADING,
    *TEXT_TO_IMAGE,
    *SDXL,
    *IMAGE_TO_IMAGE,
    *INPAINTING,
    *SCHEDULERS,
    *LORA,
    *CALLBACKS,
    *MEMORY,
]
