"""Identify a pipeline, a policy or a loop by digests of everything that its results depend on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

from diffcache.errors import UnsupportedModel, Unusable
from diffcache.host import digest
from diffcache.host.digest import TO_DIGEST, NoDigestError
from diffcache.host.kinds import kind_of
from diffcache.host.own_loops import Clock
from diffcache.patch import BoundMethod, unlayered

PACKAGES = ("diffcache", "torch", "diffusers", "transformers", "peft", "accelerate")

# Attributes that follow from a run, or that no result depends on.
OF_RUNS = frozenset(
    # attributes of models of diffusers and transformers: their origin, issued warnings, caches of one call
    "_name_or_path name_or_path _commit_hash transformers_version _diffusers_version "
    "_use_default_values warnings_issued deprecation_warnings RopeEmbedder.freqs_cis _feat_map _conv_num _conv_idx "
    "_enc_feat_map _enc_conv_num _enc_conv_idx "
    # attributes of policies: queued observations and actions
    "_queues _action_queue "
    # attributes of guiders
    "_step _num_inference_steps _timestep _count_prepared momentum_buffer".split()
)
OF_STEPS = frozenset(  # attributes of noise schedulers that are set when a run begins, or by its steps
    "timesteps sigmas num_inference_steps _step_index _begin_index _timesteps prk_timesteps plms_timesteps "
    "custom_timesteps timestep_list is_scale_input_called model_outputs lower_order_nums this_order order_list "
    "this_predictor_order this_corrector_order last_sample last_noise sample noise_sampler prev_derivative derivatives "
    "dt ets counter cur_model_output cur_sample sigmas_interpol sigmas_up sigmas_down mid_point_sigma log_sigmas "
    "discrete_sigmas _times _noise _committed _piflow_raw_timesteps _transfer_schedule temperatures init_noise_sigma "
    "tree trees start_sigmas end_sigmas ori_start_sigmas timesteps_per_stage sigmas_per_stage timestep_ratios".split()
)
# Attributes of every module that its forward does not read. Hooks are read separately, because their keys differ from
# process to process.
OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Hooks of accelerate and diffusers that move weights to the device where they are needed, and change no value.
MOVERS = frozenset(
    "AlignDevicesHook CpuOffload UserCpuOffloadHook GroupOffloadingHook LazyPrefetchGroupOffloadingHook "
    "LayerExecutionTrackerHook".split()
)


def digest_of(value: object) -> str:
    """Return the digest of any value, including modules and pipelines. Raise NoDigestError if it has none."""
    return digest.digest_of(value, parts_of)


def digest_of_call(call: Mapping[str, Any], name: str = "calls", otherwise: str = "") -> str:
    """Return the digest of the arguments of a call.

    Args:
        call: Arguments of the pipeline by name.
        name: The name of the call in errors.
        otherwise: A further allowed value, for the error.

    Raises:
        BadOption: An argument cannot be recognised in a later run, such as a closure: its captured values may differ.
    """
    try:
        return digest.digest_of(dict(call), parts_of, plain=True)
    except NoDigestError as error:
        raise Unusable(
            name,
            f"a later run cannot recognise {error.what} at {error.where or 'the top'}. Allowed: tensors, arrays, "
            "pictures, numbers, texts, generators, and functions at the top level of a module",
            "Move a function to the top level of a module, with its settings as constants, or give the object "
            f"{TO_DIGEST}{otherwise}",
        ) from None


def identity(pipe: Any, unknown: Callable[[str, NoDigestError], str]) -> dict[str, str]:
    """Return digests of everything that the results of a pipeline depend on, except the call.

    Args:
        pipe: A pipeline, or a :class:`Loop`, including that of a policy.
        unknown: Called with the name of a part and the reason if a part has no digest. It returns a replacement for the
            digest, or raises.

    Returns:
        Name of a part -> digest or text: "pipeline", each component, "versions" and "torch settings".
    """
    described: dict[str, object] = {"pipeline": (type(pipe), dict(_beside_components(pipe)))}
    described |= {name: part for name, part in kind_of(pipe).parts(pipe).items() if part is not None}
    described["torch settings"] = torch_settings()
    found: dict[str, str] = {}
    for name, part in described.items():
        try:
            found[name] = digest_of((part, _devices(part)) if isinstance(part, nn.Module) else part)
        except NoDigestError as reason:
            found[name] = unknown(name, reason)
    found["versions"] = ", ".join(f"{name} {version}" for name, version in _versions())
    return found


def parts_of(value: Any) -> Mapping[str, Any] | None:
    """Return the attributes that the results of an object depend on; None for all of its state."""
    if isinstance(value, nn.Module):
        return dict(_of_module(value))
    if isinstance(value, Clock):
        return {"config": value.config}
    if isinstance(value, BoundMethod):
        return {"owner": value.of(), "name": value.name}
    if type(value).__name__ in MOVERS:
        return {}
    if type(value).__module__ == "tokenizers" and hasattr(value, "to_str"):
        file = json.loads(value.to_str())
        return {
            name: part for name, part in file.items() if name not in ("padding", "truncation")
        }  # these two belong to the last call
    if not hasattr(value, "__dict__"):
        return None
    if isinstance(getattr(value, "components", None), Mapping):
        return {"components": value.components, **dict(_beside_components(value))}
    package = type(value).__module__.partition(".")[0]
    steps = hasattr(value, "set_timesteps") and hasattr(value, "step")
    return dict(_kept(value, OF_RUNS | OF_STEPS if steps else OF_RUNS)) if steps or package in PACKAGES else None


def _kept(value: Any, left_out: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object except those in ``left_out``, without diffcache's layers.

    Entries of ``left_out`` are names of attributes, or "Class.name". Private entries of configurations are left out
    too.
    """
    for name, held in unlayered(value).items():
        if name in ("config", "_internal_dict") and isinstance(held, Mapping):
            yield name, {key: item for key, item in held.items() if not str(key).startswith("_")}
        elif name not in left_out and f"{type(value).__name__}.{name}" not in left_out:
            yield name, held


def _of_module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a module that its results depend on.

    These are weights, buffers, submodules, forward hooks and all other attributes: a layered forward, an attention
    processor, the scale of an adapter.
    """
    wrapped = module._modules.get("_orig_mod")
    if wrapped is not None:  # a module that torch.compile wrapped
        yield "_orig_mod", wrapped
        return
    yield "compiled", getattr(module, "_compiled_call_impl", None) is not None
    elsewhere = _offloaded(module)
    yield "_parameters", {name: elsewhere.get(name, held) for name, held in module._parameters.items()}
    yield "_buffers", {name: elsewhere.get(name, held) for name, held in module._buffers.items()}
    yield "_modules", module._modules
    for kind in FORWARD_HOOKS:
        hooks = getattr(module, kind)
        with_keywords = getattr(module, f"{kind}_with_kwargs")
        yield kind, [(hook, key in with_keywords) for key, hook in hooks.items()]
    for name, held in _kept(module, OF_RUNS | OF_TORCH):
        if name != "_diffusers_hook" or held.hooks:  # a run leaves an empty registry
            yield name, held


def _beside_components(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public attributes of a pipeline other than its components, and the methods that were replaced.

    Private attributes belong to the last run.
    """
    try:
        kind = kind_of(pipe)
        settings, parts = kind.settings(pipe), kind.parts(pipe)
    except UnsupportedModel:  # an object with components, but not a host
        settings, parts = None, pipe.components
    if settings is not None:
        yield from settings.items()
        return
    yield "_blocks", getattr(pipe, "_blocks", None)
    for name, held in _kept(pipe, OF_RUNS):
        public = not name.startswith("_") or name == "_internal_dict"
        if name not in parts and (public or callable(held)):
            yield name, held


def _offloaded(module: nn.Module) -> dict[str, str]:
    """Return digests of parameters and buffers that are stored elsewhere while the module does not run.

    Raises:
        NoDigestError: diffusers has offloaded the weights to disk.
    """
    found: dict[str, str] = {}
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # accelerate
        kept = getattr(one, "weights_map", None)
        for name, held in (*module._parameters.items(), *module._buffers.items()):
            if held is not None and held.is_meta and kept is not None:
                found[name] = digest_of(kept[name])
    registry = getattr(module, "_diffusers_hook", None)
    group = getattr(getattr(registry, "hooks", {}).get("group_offloading"), "group", None)
    if getattr(group, "_is_offloaded_to_disk", False):  # diffusers leaves empty tensors in place of the weights
        raise NoDigestError("", "weights that diffusers has offloaded to disk")
    return found


def _devices(module: nn.Module) -> list[str]:
    """Return the types of the devices on which a module computes."""
    hook = getattr(module, "_hf_hook", None)
    on = getattr(hook, "execution_device", None)
    if on is not None:
        return [torch.device(on if not isinstance(on, int) else f"cuda:{on}").type]
    return sorted({held.device.type for held in module.parameters() if not held.is_meta})


def torch_settings() -> dict[str, Any]:
    """Return the settings of torch and diffusers that results depend on."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    return {
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": (cuda.matmul.allow_tf32, cudnn.allow_tf32),
        "reduced precision": (
            str(cuda.matmul.allow_fp16_reduced_precision_reduction),
            str(cuda.matmul.allow_bf16_reduced_precision_reduction),
        ),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
        "attention": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            _attention_backend(),
        ),
        "autocast": {
            kind: str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        },
        "default dtype": torch.get_default_dtype(),
        "denormals": bool(torch.tensor(1e-40) * 1.0 != 0),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "hooks": [
            list(getattr(nn.modules.module, name).values())
            for name in ("_global_forward_pre_hooks", "_global_forward_hooks")
        ],
    }


def _attention_backend() -> str:
    """Return the backend that ``diffusers.attention_backend`` has set."""
    try:
        from diffusers.models import attention_dispatch
    except ImportError:
        return ""
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    return str(getattr(registry, "_active_backend", ""))


def _versions() -> Iterator[tuple[str, str]]:
    """Yield the names and versions of the installed packages among PACKAGES."""
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
