"""Images with the settings of other tools, by the rules of their formats; what must be read from each."""

import io
import json
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo


class ToolImage(NamedTuple):
    """A file's bytes, its suffix, the values that must be read, and words that must be among the lost."""

    data: bytes
    values: dict[str, Any]
    lost: tuple[str, ...] = ()
    tool: str = "A1111"
    suffix: str = "png"
    loras: tuple[str, ...] = ()
    model: str = ""


PLAIN = Image.new("RGB", (8, 8), "red")


def png(**texts: str) -> bytes:
    info, file = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        (info.add_text if text.isascii() else info.add_itxt)(
            key.replace("_", "-") if key == "sd_metadata" else key, text
        )
    PLAIN.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def with_comment(form: str, comment: bytes) -> bytes:
    """A UserComment in the Exif IFD, as piexif writes it for A1111."""
    exif, file = Image.Exif(), io.BytesIO()
    exif.get_ifd(0x8769)[0x9286] = comment
    PLAIN.save(file, form, exif=exif)
    return file.getvalue()


def with_exif(form: str, **tags: str) -> bytes:
    """Strings in the main directory of EXIF, as ComfyUI and Fooocus write them with Pillow."""
    exif, file = Image.Exif(), io.BytesIO()
    for tag, text in tags.items():
        exif[int(tag.removeprefix("t"), 16)] = text
    PLAIN.save(file, form, exif=exif)
    return file.getvalue()


def infotext(prompt: str, negative: str = "", **fields: Any) -> str:
    """A1111's text: create_infotext of its modules/processing.py."""
    values = {"Steps": 20, "Sampler": "Euler a", "CFG scale": 7, "Seed": 965400086, "Size": "512x768"} | {
        name.replace("_", " "): value for name, value in fields.items()
    }
    quoted = {k: json.dumps(v) if any(c in str(v) for c in ",:\n") else v for k, v in values.items() if v is not None}
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in quoted.items())])


BASE = {"prompt": "a cat, (fur:1.2)", "num_inference_steps": 20, "guidance_scale": 7.0, "seed": 965400086}
A1111 = {**BASE, "negative_prompt": "blurry, low\nquality", "width": 512, "height": 768}
NEGATIVE = A1111["negative_prompt"]


def a1111(**fields: Any) -> str:
    return infotext(A1111["prompt"], NEGATIVE, **fields)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "is_changed": [float("nan")]}


def graph(**changes: Any) -> dict[str, Any]:
    """ComfyUI's default workflow in the format of its API; a change replaces or adds a node."""
    nodes = {
        "n3": node(
            "KSampler",
            **{"seed": 7, "steps": 25, "cfg": 8.0, "sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras"},
            **{"denoise": 1.0, "model": ["n4", 0], "positive": ["n6", 0], "negative": ["n7", 0]},
            latent_image=["n5", 0],
        ),
        "n4": node("CheckpointLoaderSimple", ckpt_name="sd/dream.safetensors"),
        "n5": node("EmptyLatentImage", width=512, height=640, batch_size=1),
        "n6": node("CLIPTextEncode", text="a cat", clip=["n4", 1]),
        "n7": node("CLIPTextEncode", text="blurry [x]", clip=["n4", 1]),
        "n8": node("VAEDecode", samples=["n3", 0], vae=["n4", 2]),
        "n9": node("SaveImage", filename_prefix="ComfyUI", images=["n8", 0]),
    } | changes
    return {key.removeprefix("n"): _renamed(value) for key, value in nodes.items() if value}


def _renamed(value: Any) -> Any:
    inputs = {
        name: [str(v[0]).removeprefix("n"), v[1]] if isinstance(v, list) and len(v) == 2 else v
        for name, v in value["inputs"].items()
    }
    return {**value, "inputs": inputs}


def comfy(**changes: Any) -> bytes:
    return png(prompt=json.dumps(graph(**changes)), workflow='{"nodes": []}')


COMFY = {
    **{"prompt": "a cat", "negative_prompt": "blurry \\[x\\]", "seed": 7, "num_inference_steps": 25},
    **{"guidance_scale": 8.0, "sampler": "dpmpp_2m_sde", "spacing": "karras", "width": 512, "height": 640},
}
SECOND = node(
    "KSampler",
    **{"seed": 9, "steps": 10, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.5},
    **{"model": ["n4", 0], "positive": ["n6", 0], "negative": ["n7", 0], "latent_image": ["n21", 0]},
)
ADVANCED = node(
    "KSamplerAdvanced",
    **{"add_noise": "enable", "noise_seed": 7, "steps": 25, "cfg": 8.0, "sampler_name": "dpmpp_2m_sde_gpu"},
    **{"scheduler": "karras", "start_at_step": 0, "end_at_step": 20, "model": ["n4", 0], "positive": ["n6", 0]},
    **{"negative": ["n7", 0], "latent_image": ["n5", 0]},
)
INVOKE = {
    **{"generation_mode": "txt2img", "positive_prompt": "a cat, fur++ (soft light)1.3", "negative_prompt": "blurry"},
    **{"width": 512, "height": 640, "seed": 7, "cfg_scale": 6.5, "steps": 30, "scheduler": "dpmpp_2m_k"},
    **{"clip_skip": 1, "model": {"name": "Dream", "base": "sd-1", "type": "main"}, "app_version": "5.4.0"},
    "loras": [{"model": {"name": "detail", "type": "lora"}, "weight": 0.7}],
}
INVOKE_VALUES = {
    **{"prompt": "a cat, (fur:1.21) (soft light:1.3)", "negative_prompt": "blurry", "seed": 7, "guidance_scale": 6.5},
    **{"num_inference_steps": 30, "sampler": "dpmpp_2m", "spacing": "karras", "width": 512, "height": 640},
}
FOOOCUS = {
    **{"prompt": "a cat", "negative_prompt": "blurry", "steps": 30, "guidance_scale": 4.0, "seed": "12345"},
    **{"sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras", "resolution": "(896, 1152)", "clip_skip": 2},
    **{"styles": "['Fooocus V2']", "sharpness": 2.0, "adm_guidance": "(1.5, 0.8, 0.3)", "base_model": "jugger"},
    **{"loras": [["offset.safetensors", 0.1, "abc"]], "refiner_model": "None", "version": "Fooocus v2.5.5"},
}
FOOOCUS_VALUES = {
    **{"prompt": "a cat", "negative_prompt": "blurry", "seed": 12345, "guidance_scale": 4.0, "width": 896},
    **{"num_inference_steps": 30, "sampler": "dpmpp_2m_sde", "spacing": "karras", "height": 1152, "a1111_clip_skip": 2},
}

IMAGES: dict[str, ToolImage] = {
    # A1111 and Forge
    "a1111": ToolImage(
        png(parameters=a1111()), {**A1111, "sampler": "euler_ancestral", "spacing": "linspace"}, ("GPU",)
    ),
    "a1111 schedule type": ToolImage(
        png(parameters=a1111(Sampler="DPM++ 2M SDE", Schedule_type="Exponential", RNG="CPU", Model="dream")),
        {**A1111, "sampler": "dpmpp_2m_sde", "spacing": "exponential"},
        model="dream",
    ),
    "a1111 schedule in the sampler's name": ToolImage(
        png(parameters=a1111(Sampler="DPM++ 2M Karras")), {**A1111, "sampler": "dpmpp_2m", "spacing": "karras"}
    ),
    "a1111 automatic": ToolImage(
        png(parameters=a1111(Sampler="DPM++ 2M", Schedule_type="Automatic")),
        {**A1111, "sampler": "dpmpp_2m", "spacing": "karras"},
    ),
    "a1111 before schedules had names": ToolImage(
        png(parameters=a1111(Sampler="DPM++ 2M")), {**A1111, "sampler": "dpmpp_2m", "spacing": "linspace"}
    ),
    "a1111 uniform": ToolImage(
        png(parameters=a1111(Sampler="Euler", Schedule_type="Uniform")),
        {**A1111, "sampler": "euler", "spacing": "linspace"},
    ),
    "a1111 ddim": ToolImage(png(parameters=a1111(Sampler="DDIM")), {**A1111, "sampler": "ddim", "spacing": "leading"}),
    "a1111 a sampler that we do not have": ToolImage(
        png(parameters=a1111(Sampler="DPM adaptive")), A1111, ("sampler 'DPM adaptive'",)
    ),
    "a1111 hires fix": ToolImage(
        png(parameters=a1111(Denoising_strength=0.4, Hires_upscale=2, Hires_steps=10, Hires_upscaler="Latent")),
        {**A1111, "upscale": 2.0, "upscale_strength": 0.4},
        ("Hires steps 10", "Hires upscaler Latent"),
    ),
    "a1111 hires to a size": ToolImage(
        png(parameters=a1111(Denoising_strength=0.4, Hires_resize="768x1152")), {**A1111, "upscale": 1.5}
    ),
    "a1111 img2img": ToolImage(
        png(parameters=a1111(Denoising_strength=0.75, Mask_blur=4)),
        {**A1111, "strength": 0.75},
        ("initial image", "Mask blur 4"),
    ),
    "a1111 clip skip, variation, loras": ToolImage(
        png(parameters=infotext("a cat <lora:detail:0.8>", Clip_skip=2, Variation_seed=3, Lora_hashes="detail: abc")),
        {"prompt": "a cat <lora:detail:0.8>", "a1111_clip_skip": 2},
        ("Variation seed 3",),
    ),
    "a1111 unicode of two lines": ToolImage(
        png(parameters=infotext("é 雪\nsecond: line, x", "")), {"prompt": "é 雪\nsecond: line, x", "seed": 965400086}
    ),
    "a1111 jpeg": ToolImage(
        with_comment("JPEG", b"UNICODE\0" + a1111(Sampler="Heun").encode("utf-16-be")),
        {**A1111, "sampler": "heun"},
        suffix="jpg",
    ),
    "a1111 webp": ToolImage(with_comment("WEBP", b"UNICODE\0" + a1111().encode("utf-16-be")), A1111, suffix="webp"),
    "civitai jpeg, the other order of bytes": ToolImage(
        with_comment("JPEG", b"UNICODE\0" + a1111().encode("utf-16-le")), A1111, suffix="jpg"
    ),
    "ascii comment": ToolImage(with_comment("JPEG", b"ASCII\0\0\0" + a1111().encode()), A1111, suffix="jpg"),
    "forge": ToolImage(
        png(
            parameters=a1111(
                **{"Sampler": "DPM++ 2M", "Schedule_type": "Simple", "Distilled_CFG_Scale": 3.5},
                **{"Module_1": "ae", "Version": "f2.0.1v1.10.1", "Diffusion_in_Low_Bits": "Automatic", "RNG": "CPU"},
            )
        ),
        {**A1111, "sampler": "dpmpp_2m"},
        ("Distilled CFG Scale 3.5", "Module 1 ae"),
        "Forge",
    ),
    # ComfyUI
    "comfy": ToolImage(comfy(), COMFY, tool="ComfyUI", model="sd/dream.safetensors"),
    "comfy webp": ToolImage(
        with_exif("WEBP", t0110=f"prompt:{json.dumps(graph())}", t010F="workflow:{}"), COMFY, (), "ComfyUI", "webp"
    ),
    "comfy KSamplerAdvanced": ToolImage(comfy(n3=ADVANCED), COMFY, tool="ComfyUI"),
    "comfy custom sampler": ToolImage(
        comfy(
            n3=node(
                "SamplerCustomAdvanced",
                **{"noise": ["n30", 0], "guider": ["n31", 0], "sampler": ["n32", 0], "sigmas": ["n33", 0]},
                latent_image=["n5", 0],
            ),
            n30=node("RandomNoise", noise_seed=7),
            n31=node("CFGGuider", cfg=8.0, model=["n4", 0], positive=["n6", 0], negative=["n7", 0]),
            n32=node("KSamplerSelect", sampler_name="dpmpp_2m_sde"),
            n33=node("KarrasScheduler", steps=25, sigma_max=14.6, sigma_min=0.03, rho=7.0),
        ),
        COMFY,
        tool="ComfyUI",
    ),
    "comfy SDXL's two texts": ToolImage(
        comfy(
            n6=node(
                "CLIPTextEncodeSDXL",
                **{"width": 1024, "height": 768, "crop_w": 4, "crop_h": 0, "target_width": 512, "target_height": 640},
                **{"text_g": "a cat", "text_l": "fur", "clip": ["n4", 1]},
            )
        ),
        {**COMFY, "original_size": (768, 1024), "crops_coords_top_left": (0, 4), "target_size": (640, 512)},
        ("text_l 'fur'",),
        "ComfyUI",
    ),
    "comfy LoRAs and clip skip": ToolImage(
        comfy(
            n10=node(
                "LoraLoader",
                **{"lora_name": "x/detail.safetensors", "strength_model": 0.8, "strength_clip": 0.5},
                **{"model": ["n4", 0], "clip": ["n4", 1]},
            ),
            n11=node("LoraLoaderModelOnly", lora_name="lcm.safetensors", strength_model=1.0, model=["n10", 0]),
            n12=node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["n10", 1]),
            n13=node("FreeU_V2", model=["n11", 0], b1=1.1),
            n6=node("CLIPTextEncode", text="a cat", clip=["n12", 0]),
            n3=_renamed(node("KSampler", **{**graph()["3"]["inputs"], "model": ["n13", 0]})),
        ),
        {**COMFY, "a1111_clip_skip": 2},
        ("FreeU_V2",),
        "ComfyUI",
        loras=("<lora:detail:0.5:0.8>", "<lora:lcm:1>"),
    ),
    "comfy latent upscale and a second pass": ToolImage(
        comfy(
            n20=SECOND,
            n21=node("LatentUpscaleBy", samples=["n3", 0], upscale_method="nearest-exact", scale_by=1.5),
            n8=node("VAEDecode", samples=["n20", 0], vae=["n4", 2]),
        ),
        {**COMFY, "upscale": 1.5, "upscale_strength": 0.5},
        tool="ComfyUI",
    ),
    "comfy img2img": ToolImage(
        comfy(
            n3=node("KSampler", **{**graph()["3"]["inputs"], "denoise": 0.6, "latent_image": ["n40", 0]}),
            n40=node("VAEEncode", pixels=["n41", 0], vae=["n4", 2]),
            n41=node("LoadImage", image="photo.png"),
        ),
        {name: value for name, value in COMFY.items() if name not in ("width", "height")} | {"strength": 0.6},
        ("initial image 'photo.png'",),
        "ComfyUI",
    ),
    "comfy seeds and texts of other nodes": ToolImage(
        comfy(
            n3=node("KSampler", **{**graph()["3"]["inputs"], "seed": ["n50", 0], "steps": ["n51", 0]}),
            n50=node("Seed (rgthree)", seed=7),
            n51=node("PrimitiveInt", value=25),
            n6=node("CLIPTextEncode", text=["n52", 0], clip=["n4", 1]),
            n52=node("StringConcatenate", string_a="a", string_b=["n53", 0], delimiter=" "),
            n53=node("PrimitiveStringMultiline", value="cat"),
        ),
        COMFY,
        tool="ComfyUI",
    ),
    "comfy control and joined prompts": ToolImage(
        comfy(
            n3=node("KSampler", **{**graph()["3"]["inputs"], "positive": ["n60", 0], "negative": ["n60", 1]}),
            n60=node("ControlNetApplyAdvanced", positive=["n61", 0], negative=["n7", 0], strength=1.0),
            n61=node("ConditioningConcat", conditioning_to=["n6", 0], conditioning_from=["n62", 0]),
            n62=node("CLIPTextEncode", text="a dog", clip=["n4", 1]),
        ),
        {**COMFY, "prompt": "a cat BREAK a dog"},
        ("ControlNetApplyAdvanced",),
        "ComfyUI",
    ),
    # InvokeAI
    "invoke": ToolImage(
        png(invokeai_metadata=json.dumps(INVOKE)),
        {**INVOKE_VALUES, "clip_skip": 1},
        (),
        "InvokeAI",
        loras=("<lora:detail:0.7>",),
        model="Dream",
    ),
    "invoke img2img with control": ToolImage(
        png(
            invokeai_metadata=json.dumps(
                {**INVOKE, "strength": 0.6, "init_image": "x.png", "controlnets": [{"control_weight": 1}]}
            )
        ),
        {**INVOKE_VALUES, "strength": 0.6},
        ("initial image", "controlnets"),
        "InvokeAI",
        loras=("<lora:detail:0.7>",),
    ),
    "invoke on its canvas": ToolImage(
        png(
            invokeai_metadata=json.dumps(
                {**INVOKE, "generation_mode": "sdxl_img2img", "strength": 0.6, "rand_device": "cuda", "loras": []}
            )
        ),
        {**INVOKE_VALUES, "strength": 0.6},
        ("initial image", "that of 'cuda'"),
        "InvokeAI",
    ),
    "invoke 2": ToolImage(
        png(
            sd_metadata=json.dumps(
                {
                    **{"model": "stable diffusion", "model_weights": "sd-1.5", "app_version": "2.3.0"},
                    "image": {
                        **{"prompt": [{"prompt": "a cat [blurry]", "weight": 1}], "steps": 30, "cfg_scale": 6.5},
                        **{"width": 512, "height": 640, "seed": 7, "sampler": "k_dpmpp_2m", "seamless": True},
                    },
                }
            )
        ),
        {**INVOKE_VALUES, "prompt": "a cat"} | {"spacing": None},
        ("seamless True",),
        "InvokeAI",
        model="sd-1.5",
    ),
    "invoke 1": ToolImage(
        png(Dream='"a cat [blurry]" -s 30 -S 7 -W 512 -H 640 -C 6.5 -A k_dpmpp_2m'),
        {**INVOKE_VALUES, "prompt": "a cat"} | {"spacing": None},
        (),
        "InvokeAI",
    ),
    # Fooocus
    "fooocus": ToolImage(
        png(parameters=json.dumps(FOOOCUS), fooocus_scheme="fooocus"),
        FOOOCUS_VALUES,
        ("styles", "sharpness 2.0", "adm_guidance"),
        "Fooocus",
        loras=("<lora:offset:0.1>",),
        model="jugger",
    ),
    "fooocus a1111 scheme": ToolImage(
        png(
            parameters=infotext(
                *("cinematic still a cat . emotional, harmonious", "anime, cartoon, blurry"),
                **{"Steps": 30, "Sampler": "DPM++ 2M SDE Karras", "Seed": 12345, "Size": "896x1152", "CFG_scale": 4},
                **{"Sharpness": 2, "ADM_Guidance": "(1.5, 0.8, 0.3)", "Model": "jugger", "Model_hash": "abc"},
                **{"Performance": "Speed", "Scheduler": "karras", "VAE": "Default (model)", "Raw_prompt": "a cat"},
                **{"Raw_negative_prompt": "blurry", "Lora_hashes": "offset: abc, b: c", "Version": "Fooocus v2.5.5"},
                Lora_weights="offset: 0.1, b: 1.0",
            ),
            fooocus_scheme="a1111",
        ),
        {name: value for name, value in FOOOCUS_VALUES.items() if name != "a1111_clip_skip"},
        ("Sharpness 2", "ADM Guidance"),
        "Fooocus",
        loras=("<lora:offset:0.1>", "<lora:b:1>"),
        model="jugger",
    ),
    "fooocus jpeg": ToolImage(
        with_exif("JPEG", t9286=json.dumps(FOOOCUS), t927C="fooocus", t0131="Fooocus v2.5.5"),
        FOOOCUS_VALUES,
        ("styles", "sharpness", "adm_guidance"),
        "Fooocus",
        "jpg",
        ("<lora:offset:0.1>",),
    ),
}
