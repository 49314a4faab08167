"""A CUDA device that is not there: code with device="cuda" runs on a CPU, under CUDA's rules.

`install()` makes torch believe in GPUs for the rest of the process. A tensor "on cuda" is a subclass that holds its
numbers in ordinary memory, computes with the CPU's kernels, and says `.device == cuda:0`. What CUDA forbids raises, in
torch's words: tensors of two devices in one operation (CPU scalars may enter pointwise ones, CPU indices may index),
`.numpy()`, a generator of the wrong device, a fused optimiser whose gradients lie in another memory order than the
weights. Every wait of the host for the device is noted with the line that causes it (`WAITS`).

Two modes see everything: a TorchDispatchMode checks and runs each operation below autograd, a TorchFunctionMode notes
that a call was given a tensor of the device, so that factories inside torch (`zeros_like`, a backward formula) make
such, too. It cannot see what kernels of CUDA refuse, round or cost, nor streams and graphs.

    python tests/phantom.py run detector --rows v8n --profile smoke --device cuda      as `python -m defectlab run ...`
"""

import collections
import sys
import threading
import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
CPU = torch.device("cpu")
STATE = threading.local()  # .called: index of the device that the current call of torch's API computes on, or absent
DEVICES = 0
WAITS: collections.Counter = collections.Counter()  # (what, "file:line function", whether in a training step) -> times


# --- The tensor ------------------------------------------------------------------------------------------------------


def plain(tensor):
    """The same memory as an ordinary CPU tensor."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return aten.alias.default(tensor.detach() if tensor.requires_grad else tensor)


def index_of(device) -> int | None:
    """Index of a CUDA device, None for the CPU. `device`: None, str, int, torch.device."""
    if device is None:
        return None
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        return None
    index = current() if device.index is None else device.index
    if index >= DEVICES:
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")
    return index


def current() -> int:
    return getattr(STATE, "current", 0)


class PhantomTensor(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    index = 0

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})  # where the mode is off: other threads

    device = property(lambda self: torch.device("cuda", self.index))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return self.index

    def numpy(self, *, force=False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def tolist(self):
        synchronised("tolist")
        return plain(self).tolist()

    def new_tensor(self, data, **options):
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device} | options)

    def __repr__(self, *, tensor_contents=None):
        return f"{repr(plain(self))[:-1]}, device='{self.device}')"

    def __format__(self, form):
        return self.item().__format__(form) if self.dim() == 0 else object.__format__(self, form)

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user support the deepcopy protocol at the moment"
            )
        with torch.no_grad():
            copied = self.detach().clone()
        copied.requires_grad_(self.requires_grad)
        copied.__dict__.update(self.__dict__)
        memo[id(self)] = copied
        return copied


def _with_own_device(name):
    original = getattr(torch.Tensor, name)

    def method(self, *args, **kwargs):
        return original(self, *args, **({"device": self.device} | kwargs))

    return method


for _name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"):
    setattr(PhantomTensor, _name, _with_own_device(_name))


def wrap(tensor, index: int):
    """An ordinary tensor as one of device `index`."""
    made = torch.Tensor._make_subclass(PhantomTensor, tensor)
    if index:
        made.index = index
    return made


# --- Waits -----------------------------------------------------------------------------------------------------------


STEP = {"draw", "step", "learning_step", "loss", "Draw.__call__"}  # what `training.loop.train` calls for a batch


def synchronised(what: str) -> None:
    """Note a wait of the host for the device, with the innermost line of the package."""
    frame, place, step = sys._getframe(1), "", False
    while frame is not None:
        code = frame.f_code
        if "/defectlab/" in code.co_filename:
            place = place or f"{code.co_filename.rpartition('/defectlab/')[2]}:{frame.f_lineno} {code.co_name}"
            step |= bool({code.co_name, code.co_qualname} & STEP)
        frame = frame.f_back
    WAITS[what, place, step] += 1


# --- One operation ---------------------------------------------------------------------------------------------------

COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {
    aten.index.Tensor: 1,
    aten._unsafe_index.Tensor: 1,
    aten.index_put.default: 1,
    aten.index_put_.default: 1,
    aten._index_put_impl_.default: 1,
    aten._unsafe_index_put.default: 1,
}
SCALAR_TOO = {"masked_fill", "masked_fill_", "fill_", "fill", "lerp_", "lerp", "where", "clamp_", "clamp", "copysign"}
WAITING = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "equal": "equal",
    "bincount": "bincount",
    "nms": "nms",
    "linalg_cholesky": "linalg",
    "linalg_inv": "linalg",
    "linalg_solve": "linalg",
}
IN_FLOAT32 = {  # bf16 on CPUs is slow, and the gradient of a dilated depthwise convolution wrong (torch 2.11)
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
}


def flat(values, tensors, generators):
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            flat(value, tensors, generators)
        elif isinstance(value, torch._C.Generator):
            generators.append(value)


COMPOSITE: dict = {}  # operation -> whether it consists of others, which inference mode does not take apart


def run(func, args, kwargs):
    if torch.is_inference_mode_enabled():
        if func not in COMPOSITE:
            COMPOSITE[func] = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if COMPOSITE[func]:
            with Dispatch():
                return func.decompose(*args, **kwargs)
    tensors, generators = [], []
    flat(args, tensors, generators)
    flat(kwargs.values(), tensors, generators)
    here = {t.index for t in tensors if type(t) is PhantomTensor}
    asked = kwargs.get("device")
    name = func._schema.name.split("::")[-1]
    if func is aten._to_copy.default:
        return _copied(func, args, kwargs, asked)
    wanted = index_of(asked)
    if wanted is None and not here and asked is not None and asked.type == "cpu":
        wanted = getattr(STATE, "called", None)  # a factory within a call that was given tensors of the device
    if not here and wanted is None:
        _check_generators(generators, None)
        return _computed(func, args, kwargs)
    if func is aten.copy_.default:
        _check_copy(args)
    elif here:
        _check_devices(func, name, args, tensors, here)
    if name.startswith("_fused_"):
        _check_fused(name, args)
    index = min(here) if here else wanted
    _check_generators(generators, index)
    if name in WAITING and here:
        synchronised(WAITING[name])
    if asked is not None:
        kwargs = {**kwargs, "device": CPU}
    return _wrapped(_computed(func, args, kwargs), index)


def _computed(func, args, kwargs):
    with torch._C._DisableTorchDispatch():
        if func not in IN_FLOAT32:
            return func(*args, **kwargs)
        low = any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args)
        if not low:
            return func(*args, **kwargs)
        out = func(
            *(a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args), **kwargs
        )
        if isinstance(out, torch.Tensor):
            return out.to(torch.bfloat16)
        return tuple(o if o is None else o.to(torch.bfloat16) for o in out)


def _wrapped(out, index):
    if type(out) is torch.Tensor:
        return wrap(out, index)
    if isinstance(out, (list, tuple)):
        parts = [_wrapped(o, index) for o in out]
        return parts if isinstance(out, list) else tuple(parts)
    return out


def _copied(func, args, kwargs, asked):
    source = args[0].index if type(args[0]) is PhantomTensor else None
    called = getattr(STATE, "called", None)
    if asked is not None and asked.type == "meta":
        return _computed(func, args, kwargs)
    if asked is None:
        target = source
    elif asked.type == "cuda":
        target = index_of(asked)
    else:  # C++ calls every tensor's device "cpu": only `Tensor.cpu` and `Tensor.to` mean it
        target = None if getattr(STATE, "leaving", False) else source if source is not None else called
    if source != target and not (kwargs.get("non_blocking") and _pinned(args[0])):
        synchronised("device to host" if target is None else "host to device" if source is None else "device to device")
    out = _computed(func, args, {**kwargs, "device": CPU} if asked is not None else kwargs)
    if target is None:
        return out
    return wrap(out, target)


def _pinned(tensor) -> bool:
    """Whether it is the host's. CUDA wants it pinned, too; that is not seen here, and `precision.sent` does it."""
    return type(tensor) is not PhantomTensor


def _check_copy(args):
    target, source = args[:2]
    sides = [t.index if type(t) is PhantomTensor else None for t in (target, source)]
    blocking = not (len(args) > 2 and args[2])
    if sides[0] != sides[1] and blocking and not (sides[1] is None and source.dim() == 0 and source.numel() == 1):
        synchronised("device to host" if sides[0] is None else "host to device")


def _check_devices(func, name, args, tensors, here):
    if len(here) > 1:
        one, two = sorted(here)[:2]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:{one} and cuda:{two}! (phantom, in {func})"
        )
    if func in INDEXING:
        return _check_indexing(func, args)
    scalars = torch.Tag.pointwise in func.tags or name in SCALAR_TOO or name.startswith(("_foreach", "_fused"))
    for tensor in tensors:
        if type(tensor) is PhantomTensor or (tensor.dim() == 0 and scalars):
            continue
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:{min(here)} and cpu! "
            f"(phantom, in {func}, CPU tensor of shape {tuple(tensor.shape)})"
        )


def _check_indexing(func, args):
    target, indices = args[0], [i for i in args[1] if i is not None]
    on_device = type(target) is PhantomTensor
    for i in indices:
        if type(i) is PhantomTensor and not on_device:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if type(i) is not PhantomTensor and on_device:
            synchronised("index from the host")
    value = args[2] if len(args) > 2 else None
    if value is not None and type(value) is not type(target) and value.dim() != 0:
        on = ["cuda" if type(t) is PhantomTensor else "cpu" for t in (value, target)]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {on[0]} and {on[1]} (in {func})")
    masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
    filled = value is not None and value.numel() == 1 and type(value) is not PhantomTensor and len(indices) == 1
    if on_device and masks and not filled:
        synchronised("boolean mask")


def _check_fused(name, args):
    """CUDA's fused optimisers refuse gradients and moments whose strides differ from the weights'; the CPU's pairs them
    by memory order."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a][: 3 if "sgd" in name else 4]
    for tensors in zip(*lists, strict=True):
        first = [step for step, side in zip(tensors[0].stride(), tensors[0].shape, strict=True) if side != 1]
        for other in tensors[1:]:
            strides = [step for step, side in zip(other.stride(), other.shape, strict=True) if side != 1]
            if other.shape != tensors[0].shape or strides != first or other.dtype != tensors[0].dtype:
                raise RuntimeError(
                    "params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout "
                    f"(phantom, in {name}: strides {tensors[0].stride()} and {other.stride()} of {tuple(other.shape)})"
                )


def _check_generators(generators, index):
    for generator in generators:  # C++ hands over its own object, not the one that Python made
        kind = "cuda" if generator._cdata in CUDA_GENERATORS else "cpu"
        wanted = "cpu" if index is None else "cuda"
        if kind != wanted:
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{kind}'")


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Called(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(STATE, "called", None) is not None or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        index = _first(args) if args else None
        if index is None and kwargs:
            index = _first(kwargs.values())
        if index is None:
            return func(*args, **kwargs)
        STATE.called = index
        try:
            return func(*args, **kwargs)
        finally:
            STATE.called = None


def _first(values):
    for value in values:
        if type(value) is PhantomTensor:
            return value.index
        if isinstance(value, (list, tuple)):
            found = _first(value)
            if found is not None:
                return found
    return None


# --- Moving ----------------------------------------------------------------------------------------------------------


def _moving(originals):
    to_original = originals["to"]

    def to(self, *args, **kwargs):
        copy = kwargs.pop("copy", False)
        other = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.pop("other", None)
        if other is not None:
            device, dtype, non_blocking, memory_format = other.device, other.dtype, False, kwargs.get("memory_format")
        else:
            if len(args) > 1 and isinstance(args[-1], bool) and len([a for a in args if isinstance(a, bool)]) > 1:
                *args, copy = args  # to(dtype, non_blocking, copy)
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        source = self.index if type(self) is PhantomTensor else None
        target = source if device is None else index_of(device)
        if device is not None and device.type not in ("cpu", "cuda"):  # meta
            return to_original(plain(self) if source is not None else self, device, dtype or self.dtype)
        options = {} if memory_format is None else {"memory_format": memory_format}
        if source == target:
            return to_original(self, dtype or self.dtype, non_blocking, copy, **options)
        target_device = CPU if target is None else torch.device("cuda", target)
        STATE.leaving, before = target is None, getattr(STATE, "leaving", False)
        try:
            return aten._to_copy.default(self, dtype=dtype, device=target_device, non_blocking=non_blocking, **options)
        finally:
            STATE.leaving = before

    def cpu(self, **options):
        return to(self, "cpu", **options)

    def cuda(self, device=None, non_blocking=False, **options):
        return to(
            self, torch.device("cuda", current()) if device is None else device, non_blocking=non_blocking, **options
        )

    def type_as(self, other):
        return to(self, other)

    def pin_memory(self, device=None):
        if type(self) is PhantomTensor:
            raise RuntimeError(f"cannot pin 'torch.cuda.{self.dtype}' only dense CPU tensors can be pinned")
        return self

    return {"to": to, "cpu": cpu, "cuda": cuda, "type_as": type_as, "pin_memory": pin_memory}


def _made_from_data(original):
    """`torch.tensor` and `torch.as_tensor`, whose C++ asks the driver for the device."""

    def made(data, *, dtype=None, device=None, **options):
        index = index_of(device)
        if index is None:
            if device is None and type(data) is PhantomTensor:
                index = data.index
            elif type(data) is PhantomTensor:
                data = data.cpu()
        tensor = original(data, dtype=dtype, **({"device": "cpu"} if device is not None else {}), **options)
        return tensor if index is None else tensor.to(torch.device("cuda", index))

    return made


# --- torch.cuda ------------------------------------------------------------------------------------------------------

Properties = collections.namedtuple("Properties", "name major minor total_memory multi_processor_count")


def _torch_cuda():
    def number(device=None):
        return index_of("cuda" if device is None else device)

    def start(*args, **kwargs):
        STATE.started = True

    def set_device(device):
        STATE.current = number(device)

    def properties(device=None):
        start()
        number(device)
        return Properties("Phantom", 9, 0, 80 * 2**30, 132)

    def nothing(*args, **kwargs):
        return None

    return {
        "is_available": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": current,
        "set_device": set_device,
        "is_initialized": lambda: True,
        "init": start,
        "_lazy_init": start,
        "synchronize": lambda device=None: synchronised("synchronize"),
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved", "memory_allocated"), lambda device=None: 0),
        **dict.fromkeys(("reset_peak_memory_stats", "empty_cache", "manual_seed", "manual_seed_all"), nothing),
        "is_current_stream_capturing": lambda: False,
    }


CUDA_GENERATORS: set[int] = set()


class PhantomGenerator(torch.Generator):
    """A CUDA generator, as far as one can be had: it says "cuda" and draws what a CPU one draws."""

    def __new__(cls, device="cpu"):
        index = index_of(device)
        made = super().__new__(cls)
        made.place = CPU if index is None else torch.device("cuda", index)
        if index is not None:
            CUDA_GENERATORS.add(made._cdata)
            weakref.finalize(made, CUDA_GENERATORS.discard, made._cdata)
        return made

    device = property(lambda self: self.place)


# --- All of it -------------------------------------------------------------------------------------------------------

_installed: list = []


def install(devices: int = 1) -> None:
    """For the rest of the process. Before `import defectlab`, so that nothing has asked for CUDA yet."""
    global DEVICES
    if _installed:
        return
    DEVICES = devices
    originals = {name: getattr(torch.Tensor, name) for name in ("to", "cpu", "cuda", "type_as", "pin_memory")}
    for name, method in _moving(originals).items():
        setattr(torch.Tensor, name, method)
    for name, function in _torch_cuda().items():
        setattr(torch.cuda, name, function)
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists, with_indices=False):  # as the optimisers and clip_grad_norm_ want it: by the said device
        found = {}
        for (device, dtype), content in group(lists, with_indices).items():
            first = next((t for tensors in content[0] for t in tensors if t is not None), None)
            found[first.device if type(first) is PhantomTensor else device, dtype] = content
        return found

    torch._C._group_tensors_by_device_and_dtype = grouped
    torch.nn.utils.clip_grad._has_foreach_support = lambda tensors, device: True  # it asks for the exact class
    _device_constructors()  # it keeps the functions that `with torch.device(...)` is to know: the originals
    torch.tensor, torch.as_tensor = _made_from_data(torch.tensor), _made_from_data(torch.as_tensor)
    torch.Generator = PhantomGenerator

    apply = torch.nn.Module._apply

    def swapping(self, fn, recurse=True):  # a Parameter stays the same object, as on a real move
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(self, fn, recurse)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    torch.nn.Module._apply = swapping
    parse = torch._C._nn._parse_to

    def parsed(*args, **kwargs):  # `Module.to(tensor)`: the device that the tensor says
        other = args[0] if args else kwargs.get("tensor")
        return (other.device, other.dtype, False, None) if type(other) is PhantomTensor else parse(*args, **kwargs)

    torch._C._nn._parse_to = parsed

    export = torch.onnx.export

    def exported(*args, **kwargs):  # tracing does not get on with modes; what is exported lies on the CPU
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return export(*args, **kwargs)

    torch.onnx.export = exported

    autocast = torch.autocast

    class Autocast(autocast):
        def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
            self.said = device_type
            dtype = torch.bfloat16 if dtype is None and device_type == "cuda" else dtype  # fp16 by default on CUDA
            super().__init__("cpu" if device_type == "cuda" else device_type, dtype, enabled, cache_enabled)

    torch.autocast = torch.amp.autocast = torch.amp.autocast_mode.autocast = Autocast
    enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device_type="cuda": enabled("cpu" if device_type == "cuda" else device_type)
    modes = [Dispatch(), Called()]
    for mode in modes:
        mode.__enter__()
    _installed.extend(modes)


if __name__ == "__main__":
    install()
    from defectlab.__main__ import main

    code = main()
    for (what, place, step), times in WAITS.items():
        print(f"wait {'step' if step else '-'} {times} {what} {place}")
    sys.exit(code)
