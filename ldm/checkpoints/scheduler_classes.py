"""The scheduler classes of diffusers: the sampler that computes the same, the defaults, and what each field means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

SCHEDULE_FIELDS = "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type"
GRID = "timestep_spacing steps_offset"
SIGMAS = "use_karras_sigmas use_exponential_sigmas use_beta_sigmas"
THRESHOLD = "thresholding dynamic_thresholding_ratio sample_max_value"
CLIP = "clip_sample clip_sample_range"
FLOW = "use_flow_sigmas flow_shift use_dynamic_shifting time_shift_type"
SOLVER = f"solver_order solver_type lower_order_final {SIGMAS} {THRESHOLD} {FLOW}"
CONSISTENCY = f"""{GRID} {CLIP} {THRESHOLD} set_alpha_to_one original_inference_steps timestep_scaling
rescale_betas_zero_snr"""
PLAIN_SPACINGS = {"leading": "leading", "linspace": "linspace", "trailing": "trailing"}
MULTISTEP_SPACINGS = {"leading": "sgm_leading", "linspace": "sgm_linspace", "trailing": "trailing"}  # n of n + 1 points
SINGLE_SPACINGS = dict.fromkeys(PLAIN_SPACINGS, "sgm_linspace")  # of a class that has no choice
LCM_SPACINGS = dict.fromkeys(PLAIN_SPACINGS, "lcm")


class SchedulerSpec(NamedTuple):
    """A scheduler class: its sampler and spacing, the class's own defaults, and the fields that it reads.

    `solvers` are the samplers by `algorithm_type` and `solver_order` where the class has these, `solver_types` the
    values of `solver_type` that leave them as they are, and `spacings` its grids. `flags` are samplers by a true field.
    `final` is where its grids end, the clean image ("zero") or the model's lowest level ("sigma_min"), unless its
    `final_field` says otherwise. `exact` says that its samples are ours: otherwise the sampler is the nearest of ours.
    """

    sampler: str
    spacing: str = "linspace"
    fields: str = ""
    betas: tuple[str, float, float] = ("linear", 1e-4, 0.02)
    solvers: Mapping[tuple[str, int], str] = {}
    solver_types: tuple[str, ...] = ()
    spacings: Mapping[str, str] = PLAIN_SPACINGS
    flags: Mapping[str, str] = {}
    final: str = "zero"
    final_field: str = ""
    exact: bool = True

    @property
    def field_names(self) -> frozenset[str]:
        """The names of all fields that the class reads."""
        return frozenset(f"{SCHEDULE_FIELDS} {self.fields}".split())


DPM_SOLVERS = {
    ("dpmsolver++", 1): "ddim",
    ("dpmsolver++", 2): "dpmpp_2m",
    ("dpmsolver++", 3): "dpmpp_3m_published",
    ("sde-dpmsolver++", 1): "euler_ancestral",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
}
SINGLESTEP_SOLVERS = {
    ("dpmsolver++", 1): "ddim",
    ("dpmsolver++", 2): "dpmpp_singlestep",
    ("dpmsolver++", 3): "dpmpp_singlestep_3",
}
UNIPC_SOLVERS = {("", 1): "unipc_1", ("", 2): "unipc", ("", 3): "unipc_3"}  # it has no algorithm_type
DEIS_SOLVERS = {("deis", 1): "ddim", ("deis", 2): "deis", ("deis", 3): "deis_3"}
ALGORITHM_ALIASES = {  # what a class reads another class's algorithm_type as
    "DPMSolverMultistepScheduler": {"deis": "dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"deis": "dpmsolver++"},
    "DEISMultistepScheduler": {"dpmsolver": "deis", "dpmsolver++": "deis"},
}
DDIM = SchedulerSpec(
    "ddim",
    "leading",
    f"{GRID} {CLIP} {THRESHOLD} set_alpha_to_one rescale_betas_zero_snr",
    final_field="set_alpha_to_one",
)
DDPM = SchedulerSpec("ddpm", "leading", f"{GRID} {CLIP} {THRESHOLD} variance_type rescale_betas_zero_snr")
KDPM2_BETAS = "linear", 0.00085, 0.012
LCM_BETAS = "scaled_linear", 0.00085, 0.012
DIFFUSERS_SCHEDULERS = {
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "DDPMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    "PNDMScheduler": SchedulerSpec(
        "pndm",
        "leading",
        f"{GRID} set_alpha_to_one skip_prk_steps",
        flags={"skip_prk_steps": "plms"},
        final="sigma_min",
        final_field="set_alpha_to_one",
    ),
    "EulerDiscreteScheduler": SchedulerSpec(
        "euler",
        fields=f"""{GRID} {SIGMAS} interpolation_type sigma_min sigma_max timestep_type final_sigmas_type
        rescale_betas_zero_snr""",
        final_field="final_sigmas_type",
    ),
    "EulerAncestralDiscreteScheduler": SchedulerSpec("euler_ancestral", fields=f"{GRID} rescale_betas_zero_snr"),
    "HeunDiscreteScheduler": SchedulerSpec("heun", fields=f"{GRID} {SIGMAS} {CLIP}", betas=KDPM2_BETAS),
    "LMSDiscreteScheduler": SchedulerSpec("lms", fields=f"{GRID} {SIGMAS}"),
    "DPMSolverMultistepScheduler": SchedulerSpec(
        "dpmpp_2m",
        fields=f"""{GRID} {SOLVER} algorithm_type euler_at_final use_lu_lambdas final_sigmas_type lambda_min_clipped
        variance_type rescale_betas_zero_snr""",
        solvers=DPM_SOLVERS,
        solver_types=("midpoint", "logrho", "bh1", "bh2"),  # the last three are read as midpoint
        spacings=MULTISTEP_SPACINGS,
        final_field="final_sigmas_type",
    ),
    "DPMSolverSinglestepScheduler": SchedulerSpec(
        "dpmpp_singlestep",
        fields=f"{SOLVER} algorithm_type final_sigmas_type lambda_min_clipped variance_type",
        solvers=SINGLESTEP_SOLVERS,
        solver_types=("midpoint", "logrho", "bh1", "bh2"),
        spacings=SINGLE_SPACINGS,
        final_field="final_sigmas_type",
    ),
    "UniPCMultistepScheduler": SchedulerSpec(
        "unipc",
        fields=f"""{GRID} {SOLVER} predict_x0 disable_corrector solver_p final_sigmas_type rescale_betas_zero_snr
        sigma_min sigma_max shift_terminal""",
        solvers=UNIPC_SOLVERS,
        solver_types=("bh2", "midpoint", "heun", "logrho"),  # the last three are read as bh2
        spacings=MULTISTEP_SPACINGS,
        final_field="final_sigmas_type",
    ),
    "DEISMultistepScheduler": SchedulerSpec(
        "deis",
        fields=f"{GRID} {SOLVER} algorithm_type",
        solvers=DEIS_SOLVERS,
        solver_types=("logrho", "midpoint", "heun", "bh1", "bh2"),
        spacings=MULTISTEP_SPACINGS,
        final="sigma_min",
    ),
    "KDPM2DiscreteScheduler": SchedulerSpec("dpm_2", fields=f"{GRID} {SIGMAS}", betas=KDPM2_BETAS),
    "KDPM2AncestralDiscreteScheduler": SchedulerSpec("dpm_2_ancestral", fields=f"{GRID} {SIGMAS}", betas=KDPM2_BETAS),
    "SASolverScheduler": SchedulerSpec(  # a stochastic Adams method; ours renews the noise of all steps
        "dpmpp_2m_sde",
        fields=f"""{GRID} {SIGMAS} {THRESHOLD} predictor_order corrector_order tau_func algorithm_type lower_order_final
        use_flow_sigmas flow_shift lambda_min_clipped variance_type""",
        solvers={("data_prediction", 2): "dpmpp_2m_sde"},
        solver_types=("midpoint",),  # it has none
        spacings=MULTISTEP_SPACINGS,
        exact=False,
    ),
    "LCMScheduler": SchedulerSpec("lcm", "leading", CONSISTENCY, LCM_BETAS, spacings=LCM_SPACINGS),
    "TCDScheduler": SchedulerSpec("tcd", "leading", CONSISTENCY, LCM_BETAS, spacings=LCM_SPACINGS, final="sigma_min"),
}
EDM = "EDM's networks read x / sqrt(sigma^2 + sigma_data^2) and log(sigma) / 4, not Stable Diffusion's x and timesteps"
FLOW_MATCHING = "flow matching's networks predict noise - x_0 at (1 - t) x_0 + t noise, not Stable Diffusion's eps or v"
UNSUPPORTED_SCHEDULERS = {  # classes of other kinds of model, and why they are refused
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": EDM,
    "CosineDPMSolverMultistepScheduler": EDM,
    "IPNDMScheduler": "its timesteps fall from 1 to 0, for networks of Dance Diffusion",
    "FlowMatchEulerDiscreteScheduler": FLOW_MATCHING,
    "FlowMatchHeunDiscreteScheduler": FLOW_MATCHING,
    "FlowMatchLCMScheduler": FLOW_MATCHING,
}
SIGMA_FLAG_SPACINGS = {  # spacings by the field that is true
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta_sigmas",
    "use_lu_lambdas": "log_snr",
}
ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "timestep_type": ("discrete",),  # "continuous": a network conditioned on log sigma
    "interpolation_type": ("linear",),  # "log_linear": levels that are not those of the timesteps
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "predict_x0": (True,),
    "variance_type": (None, "fixed_small", "fixed_small_log"),  # not learned
    "lambda_min_clipped": (None, -math.inf, "-inf"),  # our steps begin where the schedule does
    "disable_corrector": ([], None),
    "solver_p": (None,),
    "original_inference_steps": (50,),  # of the grid `lcm`
    "timestep_scaling": (10.0,),  # x0 is the network's own, which it is to 7e-6 for this
    "predictor_order": (2,),
    "corrector_order": (2,),
    "tau_func": (None,),
}


class IgnoredField(NamedTuple):
    """Why a field is not read, and the values that ask for what is done anyway (none: all do).

    Stable Diffusion's own files have other values of a `quiet` one.
    """

    reason: str
    values: tuple[Any, ...]
    quiet: bool = False


IGNORED_FIELDS = {
    "clip_sample": IgnoredField("False, as diffusers' pipelines set it", (False, None)),
    "clip_sample_range": IgnoredField("of clip_sample", ()),
    "steps_offset": IgnoredField("1, as diffusers' pipelines set it", (1,)),
    "set_alpha_to_one": IgnoredField("of no effect in its class", ()),
    "euler_at_final": IgnoredField("our last step, to sigma = 0, is Euler's in any case", ()),
    "lower_order_final": IgnoredField("our samplers lower the order by the lengths of the steps", (True,), quiet=True),
    "sigma_min": IgnoredField("our grids span the whole schedule", (None,)),
    "sigma_max": IgnoredField("our grids span the whole schedule", (None,)),
    "dynamic_thresholding_ratio": IgnoredField("of thresholding alone, which is refused", ()),
    "sample_max_value": IgnoredField("of thresholding alone, which is refused", ()),
    "flow_shift": IgnoredField("of flow matching alone, which is refused", ()),
    "time_shift_type": IgnoredField("of flow matching alone, which is refused", ()),
}
