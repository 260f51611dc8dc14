"""Memory and disk: what is counted from shapes is what real tensors and files take."""

import pytest
import torch
from test_audit import recipe_of

from ldm.audit import estimates
from ldm.audit.memory import PeakMemory, make_conditioning, parameter_bytes, sampling_bytes
from ldm.train.finetune import load_base_model

BUCKET = 64, 96


def tuned(tiny, tmp_path, method="lora", **options):
    objective = {"kind": "tune", "pretrained_model_name_or_path": str(tiny), "method": method, **options}
    recipe = recipe_of(tiny, tmp_path, ["p"], objective=objective, train_batch_size=6, gradient_accumulation_steps=2)
    return recipe, estimates.load_model_config(recipe)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_of_fake_tensors_takes_what_one_of_real_tensors_takes(tiny, tmp_path, method):
    recipe, networks = tuned(tiny, tmp_path, method, frozen_dtype="float32")
    recipe = recipe.model_copy(update={"mixed_precision": "no"})
    unet = networks.prepare().unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data.normal_(0, 0.02)
    peaks = []
    for rows in (1, 2, 5):
        cond = make_conditioning(unet, rows, 16)
        with PeakMemory() as real:
            unet(torch.zeros(rows, 4, 24, 16), torch.zeros(rows), cond).float().square().mean().backward()
        unet.zero_grad()
        peaks.append(estimates.measure_step(recipe, networks, BUCKET, rows).peak)
        assert peaks[-1] == pytest.approx(real.peak, rel=0.02)
    assert peaks[0] < peaks[1] < peaks[2]


def test_a_matrix_keeps_its_input_and_not_its_weight():
    layer, x = torch.nn.Linear(5, 7, bias=False), torch.zeros(3, 5, requires_grad=True)
    with PeakMemory() as memory:
        y = layer(x)
        assert memory.alive == memory.peak == y.nbytes
        z = y.exp() + 1
        assert (memory.alive, memory.peak) == (3 * y.nbytes, 3 * y.nbytes)  # exp keeps its output
        del y, z
        assert (memory.alive, memory.peak) == (0, 3 * 4 * 3 * 7)


def test_memory_that_the_machine_does_not_have_is_an_error():
    assert [*estimates.check_memory(10**9)] == []
    (issue,) = estimates.check_memory(10**15)
    assert issue.severity == "error" and issue.what.startswith("1000000.0 GB are needed, the cpu has ")


def test_recomputing_activations_takes_less(tiny, tmp_path):
    recipe, networks = tuned(tiny, tmp_path, "full")
    plain = estimates.measure_step(recipe, networks, BUCKET, 4).peak
    recipe = recipe.model_copy(update={"gradient_checkpointing": True})
    assert estimates.measure_step(recipe, networks, BUCKET, 4).peak < plain


@pytest.mark.parametrize("method, gone", [("lora", ()), ("full", ("unet",)), ("full", ("unet", "text_encoder"))])
def test_the_model_is_loaded_in_the_dtypes_that_are_foreseen(tiny, tmp_path, method, gone):
    text = "text_encoder" in gone
    recipe, networks = tuned(tiny, tmp_path, method, frozen_dtype="bfloat16", train_text_encoder=text)
    loaded, foreseen = load_base_model(recipe.objective, torch.device("cpu")), networks.prepare()
    for name, network in loaded.networks.items():
        dtypes = {p.dtype for p in network.parameters()}
        assert dtypes == {torch.float32 if name in gone else torch.bfloat16}
        own = {p.dtype for n, p in foreseen.networks[name].named_parameters() if "lora_" not in n}
        assert dtypes == own


def test_other_phases_count_where_they_take_more(tiny, tmp_path):
    recipe, networks = tuned(tiny, tmp_path, prior_preservation=True, class_prompt="a star")
    prompts = recipe.model_copy(update={"validation_prompts": ("a",) * 8})
    none, class_images = (tuned(tiny, tmp_path)[k] for k in (0, 1)), (recipe, networks)
    totals = [estimates.estimate_memory(r, n, [(16, 16)])["total"] for r, n in (tuple(none), class_images)]
    totals.append(estimates.estimate_memory(prompts, networks, [(16, 16)])["total"])
    assert totals[0] <= totals[1] <= totals[2] and totals[0] < totals[2]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_samples_after_the_training_are_of_a_pipeline_in_its_own_dtype(tiny, tmp_path, pipe, method):
    recipe, networks = tuned(tiny, tmp_path, method, frozen_dtype="bfloat16")
    assert estimates.after_training_bytes(recipe, networks) == 0
    recipe = recipe.model_copy(update={"validation_prompts": ("a",)})
    assert estimates.sample_size(networks) == pipe.default_size(None)[::-1] == (32, 32)
    names = (".to_q", ".to_k", ".to_v", ".to_out.0")
    changed = [m.weight.nbytes for n, m in pipe.model.unet.named_modules() if n.endswith(names)]
    loaded = parameter_bytes(*pipe.model.networks.values()) + (sum(changed) if method == "lora" else 0)
    sampled = sampling_bytes(networks.spec.networks["unet"], networks.spec.networks["vae"], (32, 32), 1, torch.float32)
    assert estimates.after_training_bytes(recipe, networks) == loaded + sampled


def test_what_learns_is_counted(tiny, tmp_path, pipe):
    unet = pipe.model.unet
    _, networks = tuned(tiny, tmp_path, "full")
    assert networks.num_trainable_parameters == sum(p.numel() for p in unet.parameters())
    text = sum(p.numel() for p in pipe.model.text_encoders[0].model.parameters())
    _, both = tuned(tiny, tmp_path, "full", train_text_encoder=True)
    assert both.num_trainable_parameters == sum(p.numel() for p in unet.parameters()) + text
    attention = [m for n, m in unet.named_modules() if n.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    _, networks = tuned(tiny, tmp_path, rank=3)
    assert networks.num_trainable_parameters == 3 * sum(m.in_features + m.out_features for m in attention)
    _, words = tuned(
        tiny, tmp_path, "textual_inversion", placeholder_token="<x>", initializer_token="star", num_vectors=2
    )
    assert words.num_trainable_parameters == 2 * 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_rows_that_are_on_a_device_at_a_time(tiny, tmp_path, dtype):
    recipe, networks = tuned(tiny, tmp_path, "full", frozen_dtype=dtype)
    found = estimates.estimate_memory(recipe, networks, [(32, 32), BUCKET])
    learns = networks.num_trainable_parameters
    step = estimates.measure_step(recipe, networks, BUCKET, 3)
    assert found["activations"] == step.peak - 4 * learns and found["allocator"] == step.heap_peak // 2
    assert found["gradients"] == found["ema"] == 4 * learns and found["optimizer"] == 8 * learns
    assert found["total"] == sum(value for name, value in found.items() if name != "total")
    others = sum(p.numel() for n in ("vae", "text_encoder") for p in networks.spec.networks[n].parameters())
    assert found["frozen_weights"] == getattr(torch, dtype).itemsize * others
