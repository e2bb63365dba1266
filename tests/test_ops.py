"""The public operators as PyTorch operators: values, gradients, dispatch, tracing, layouts and bad arguments."""

import inspect

import pytest
import torch
from cases import OPERATORS, arguments, to
from oracle import error

from parnet_kernels import ops, reference
from parnet_kernels.call import SIGNATURES

STRIDES = [("repvgg_sse", 1), ("downsample_se", 1), ("downsample_se", 2), ("fusion_se", 1), ("fusion_se", 2)]
each_operator = pytest.mark.parametrize("op", OPERATORS)
each_stride = pytest.mark.parametrize(("op", "stride"), STRIDES, ids=lambda v: str(v))


def run(op: str, args: list, options: dict) -> torch.Tensor:
    return getattr(torch.ops.parnet, op)(*args, **options)


@each_stride
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values(op: str, stride: int, activation: str, dtype: torch.dtype) -> None:
    args, options = arguments(op, dtype=dtype, stride=stride, activation=activation)
    wide_args, wide_options = to(torch.float64, args, options)
    found = run(op, args, options)
    assert found.dtype == dtype
    limit = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert error(found, getattr(reference, op)(*wide_args, **wide_options)) <= limit


@each_operator
def test_functions_equal_operators(op: str) -> None:
    args, options = arguments(op)
    assert torch.equal(getattr(ops, op)(*args, **options), run(op, args, options))


@each_operator
@pytest.mark.parametrize("functions", [ops, reference], ids=["ops", "reference"])
def test_python_signatures_are_those_of_the_schema(functions, op: str) -> None:
    parameters = inspect.signature(getattr(functions, op)).parameters.values()
    signature = SIGNATURES[op]
    keyword_only = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert keyword_only == signature.options
    assert positional == [name for name in signature.tensors if name not in keyword_only]
    assert len(positional) == signature.positional


@each_operator
def test_optional_arguments(op: str) -> None:
    args, options = arguments(op, gate_bias=False, affine=False, dtype=torch.float64)
    expected = getattr(reference, op)(*args, **options)
    assert torch.allclose(run(op, args, options), expected, rtol=1e-13, atol=1e-13)
    assert torch.allclose(run(op, args[:-1], {}), expected, rtol=1e-13, atol=1e-13)


@each_operator
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2), (9, 11)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_shapes_and_layout(op: str, n: int, size: tuple[int, int], channels_last: bool) -> None:
    args, options = arguments(op, n=n, size=size)
    if channels_last:
        args = [t.to(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t for t in args]
    found = run(op, args, options)
    expected = getattr(reference, op)(*args, **options)
    assert found.shape == expected.shape
    if n:
        assert error(found, expected) <= 3e-6
    x = args[0]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def strided_variants(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of x under other strides."""
    n, c, h, w = x.shape
    wide = x.new_full((n, c + 3, h + 2, w + 5), float("nan"))
    wide[:, 2 : 2 + c, 1 : 1 + h, 3 : 3 + w] = x
    stepped = x.new_full((n, c, h, 2 * w), float("nan"))
    stepped[..., ::2] = x
    return {
        "sliced": wide[:, 2 : 2 + c, 1 : 1 + h, 3 : 3 + w],
        "sliced channels_last": wide.to(memory_format=torch.channels_last)[:, 2 : 2 + c, 1 : 1 + h, 3 : 3 + w],
        "stepped": stepped[..., ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@each_operator
def test_strides(op: str) -> None:
    args, options = arguments(op)
    expected = run(op, args, options)
    for name, x in strided_variants(args[0]).items():
        assert torch.allclose(run(op, [x, *args[1:]], options), expected, rtol=1e-5, atol=1e-5), name
    spread = [
        t if t is None or t.dim() != 1 else torch.stack((t, torch.full_like(t, float("nan"))), 1)[:, 0] for t in args
    ]
    transposed = [t if t is None or t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1) for t in spread]
    assert torch.allclose(run(op, transposed, options), expected, rtol=1e-5, atol=1e-5)
    one = args[0][:1, :, :1, :1]
    constant = one.expand(args[0].shape)
    expected = run(op, [constant.contiguous(), *args[1:]], options)
    assert torch.allclose(run(op, [constant, *args[1:]], options), expected, rtol=1e-5, atol=1e-5)


@each_operator
def test_not_a_number_and_infinity_go_through(op: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        args, options = arguments(op, n=2, size=(9, 9))
        args[0][0, 1, 4, 4] = value
        expected = getattr(reference, op)(*args, **options)
        torch.testing.assert_close(run(op, args, options), expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@each_operator
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_parameters_that_are_not_finite(op: str, activation: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        given, options = arguments(op, size=(9, 9), activation=activation)
        for i in range(2 if op == "fusion_se" else 1, len(given)):
            args = [t.clone() for t in given]
            args[i].view(-1)[1] = value
            expected = getattr(reference, op)(*args, **options)
            for _ in range(2):
                torch.testing.assert_close(run(op, args, options), expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@each_stride
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_gradients(op: str, stride: int, activation: str) -> None:
    args, options = arguments(op, n=2, c=3, k=4, size=(4, 5), dtype=torch.float64, stride=stride, activation=activation)
    tensors = [t.requires_grad_() for t in (*args, options.pop("out_scale"), options.pop("out_shift"))]

    def call(*values: torch.Tensor) -> torch.Tensor:
        return run(op, list(values[:-2]), {**options, "out_scale": values[-2], "out_shift": values[-1]})

    assert torch.autograd.gradcheck(call, tensors)
    if activation == "silu":
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)  # random directions: a twentieth of the time


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
def test_gradients_of_other_dtypes_and_layouts(op: str, dtype: torch.dtype, layout: str) -> None:
    """Against float64 gradients of the rounded arguments; the incoming gradient in several layouts."""
    args, options = arguments(op, dtype=dtype, size=(6, 6), k=4)
    wide_args, wide_options = to(torch.float64, args, options)
    results = []
    for arguments_, options_, function in ((args, options, ops), (wide_args, wide_options, reference)):
        tensors = [t.detach().clone().requires_grad_() for t in arguments_ if t is not None]
        y = getattr(function, op)(*tensors, **options_)
        g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(dtype).to(y.dtype).view(y.shape)
        if layout == "channels_last":
            g = g.to(memory_format=torch.channels_last)
        if layout == "expanded":
            g = g[:, :, :1, :1].expand(y.shape)
        results.append(torch.autograd.grad(y, tensors, g))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert error(found, expected) <= {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


def test_only_required_gradients() -> None:
    args, options = arguments("downsample_se")
    args[1].requires_grad_()
    y = run("downsample_se", args, options)
    (gradient,) = torch.autograd.grad(y.sum(), args[1])
    assert gradient.shape == args[1].shape
    with torch.no_grad():
        assert not run("downsample_se", args, options).requires_grad
    with torch.inference_mode():
        assert run("downsample_se", args, options).is_inference()


@each_operator
def test_opcheck(op: str) -> None:
    args, options = arguments(op)
    torch.library.opcheck(getattr(torch.ops.parnet, op), tuple(args), options)
    differentiable = [None if t is None else t.requires_grad_() for t in args]
    torch.library.opcheck(getattr(torch.ops.parnet, op), tuple(differentiable), options)


@each_operator
def test_autocast(op: str) -> None:
    args, options = arguments(op)
    expected = run(op, *to(torch.bfloat16, args, options))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(op, args, options)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        assert run(op, *to(torch.float64, args, options)).dtype == torch.float64
    args[1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        run(op, args, options).float().sum().backward()
    assert args[1].grad.dtype == torch.float32


@pytest.mark.parametrize("op", [pytest.param("downsample_se", marks=pytest.mark.slow), "repvgg_sse", "fusion_se"])
@pytest.mark.usefixtures("inductor")
def test_compile(op: str) -> None:
    """fullgraph, with dynamic sizes, forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda args, options: run(op, args, options) * 2, fullgraph=True, dynamic=True)
    for size in ((8, 6), (10, 13)):
        args, options = arguments(op, size=size)
        eager_x, compiled_x = (args[0].clone().requires_grad_() for _ in range(2))
        expected = run(op, [eager_x, *args[1:]], options) * 2
        found = compiled([compiled_x, *args[1:]], options)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
        expected.square().sum().backward()
        found.square().sum().backward()
        assert torch.allclose(compiled_x.grad, eager_x.grad, rtol=1e-4, atol=1e-4)


class Layer(torch.nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        args, self.options = arguments(op)
        self.maps = 2 if op == "fusion_se" else 1
        self.parameters_ = torch.nn.ParameterList(args[self.maps :])

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        return run(self.op, [*maps, *self.parameters_], self.options)


@each_operator
def test_export_with_dynamic_sizes(op: str) -> None:
    layer = Layer(op)
    maps = tuple(arguments(op, n=2, size=(8, 10))[0][: layer.maps])
    dims = {0: torch.export.Dim("n", min=1), 2: torch.export.Dim("h", min=3), 3: torch.export.Dim("w", min=3)}
    exported = torch.export.export(layer, maps, dynamic_shapes=((dims,) * layer.maps,))
    assert any(node.target is getattr(torch.ops.parnet, op).default for node in exported.graph.nodes)
    other = arguments(op, n=3, size=(7, 5))[0][: layer.maps]
    assert torch.allclose(exported.module()(*other), layer(*other), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("inductor")
def test_ahead_of_time_compilation(tmp_path) -> None:
    layer = Layer("repvgg_sse").eval()
    maps = tuple(arguments("repvgg_sse", n=2, size=(8, 10))[0][:1])
    with torch.no_grad():
        exported = torch.export.export(layer, maps)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layer.pt2"))
        found = torch._inductor.aoti_load_package(package)(*maps)
    assert torch.allclose(found, layer(*maps), rtol=1e-5, atol=1e-5)


BAD_ARGUMENTS = [
    ("repvgg_sse", {"x": lambda t: t.to(torch.float8_e4m3fn)}, "`x` must be a float64, .* got torch.float8_e4m3fn"),
    ("repvgg_sse", {"x": lambda t: t[0]}, "`x` must have 4 dimensions"),
    ("repvgg_sse", {"x": lambda t: t.int()}, "`x` must be a float64, .* tensor, got torch.int32"),
    ("repvgg_sse", {"x": lambda t: t[:, :0]}, "`x` must have C, H, W ≥ 1"),
    ("repvgg_sse", {"x": lambda t: t[:, :, :0]}, "`x` must have C, H, W ≥ 1"),
    ("repvgg_sse", {"x": lambda t: t[:, :3]}, r"`weight` must have shape \[4, 3, 3, 3\].*got \[4, 4, 3, 3\]"),
    ("repvgg_sse", {"weight": lambda t: t[:2]}, "`bias` must have shape"),
    ("repvgg_sse", {"weight": lambda t: t[..., 0]}, "`weight` must have 4 dimensions"),
    ("repvgg_sse", {"weight": lambda t: t[:, :, :2]}, r"`weight` must have shape \[4, 4, 3, 3\]"),
    (
        "repvgg_sse",
        {"weight": lambda t: t.double()},
        "`weight` must have the dtype of `x`, torch.float32, got torch.float64",
    ),
    ("repvgg_sse", {"weight": lambda t: t.to("meta")}, "`weight` must be on the device of `x`, cpu, got meta"),
    ("repvgg_sse", {"bias": lambda t: t[:1]}, r"`bias` must have shape \[4\]"),
    ("repvgg_sse", {"skip_scale": lambda t: t[:1]}, "`skip_scale` must have shape"),
    ("repvgg_sse", {"skip_shift": lambda t: t[None]}, "`skip_shift` must have shape"),
    ("repvgg_sse", {"gate_weight": lambda t: t[..., None, None]}, r"`gate_weight` must have shape \[4, 4\]"),
    ("repvgg_sse", {"gate_bias": lambda t: t[:3]}, "`gate_bias` must have shape"),
    ("repvgg_sse", {"activation": lambda _: "gelu"}, r"`activation` must be one of \['relu', 'silu'\], got 'gelu'"),
    ("repvgg_sse", {"out_scale": lambda _: None}, "`out_scale` must be given together with `out_shift`"),
    ("repvgg_sse", {"out_shift": lambda _: None}, "`out_shift` must be given together with `out_scale`"),
    ("repvgg_sse", {"out_shift": lambda t: t[:2]}, "`out_shift` must have shape"),
    ("downsample_se", {"stride": lambda _: 3}, "`stride` must be 1 or 2, got 3"),
    ("downsample_se", {"stride": lambda _: 0}, "`stride` must be 1 or 2, got 0"),
    ("downsample_se", {"weight": lambda t: t[:0]}, "`weight` must have K ≥ 1"),
    (
        "fusion_se",
        {"y": lambda t: t[:, :, :3]},
        r"`y` must have shape \[2, 4, 5, 7\] \(that of `x`\), got \[2, 4, 3, 7\]",
    ),
    ("fusion_se", {"y": lambda t: t[:1]}, "`y` must have shape"),
    ("fusion_se", {"y": lambda t: t.half()}, "`y` must have the dtype of `x`"),
    ("fusion_se", {"y": lambda t: t[0]}, "`y` must have 4 dimensions"),
]
POSITIONAL = {
    "repvgg_sse": ["x", "weight", "bias", "skip_scale", "skip_shift", "gate_weight", "gate_bias"],
    "downsample_se": ["x", "weight", "bias", "gate_weight", "gate_bias"],
    "fusion_se": ["x", "y", "weight", "bias", "gate_weight", "gate_bias"],
}


@pytest.mark.parametrize(
    ("op", "change", "message"), BAD_ARGUMENTS, ids=lambda v: str(v)[:60] if isinstance(v, str) else ""
)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "fake"])
def test_bad_arguments(op: str, change: dict, message: str, traced: bool) -> None:
    """The error names the argument, the requirement and what was got; in eager mode and in tracing alike."""
    args, options = arguments(op)
    named = dict(zip(POSITIONAL[op], args, strict=True)) | options
    for name, how in change.items():
        named[name] = how(named.get(name))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if traced else torch.no_grad():
        if traced:
            named = {
                n: torch.empty_like(v, device=v.device) if isinstance(v, torch.Tensor) else v for n, v in named.items()
            }
        with pytest.raises(ValueError, match=message):
            run(op, [named.pop(n) for n in POSITIONAL[op]], named)


@each_operator
def test_x_is_blamed_where_it_is_what_differs(op: str) -> None:
    args, options = arguments(op, c=4, size=(7, 6))
    named = dict(zip(POSITIONAL[op], args, strict=True)) | options
    maps = [name for name in ("x", "y") if name in named]

    def changed(how) -> dict:
        return named | {name: how(named[name]) for name in maps}

    with pytest.raises(
        ValueError, match=r"`x` must have the dtype of the parameters, torch\.float32, got torch\.float16"
    ):
        getattr(ops, op)(**changed(lambda t: t.half()))
    with pytest.raises(ValueError, match="`x` must be on the device of the parameters, cpu, got meta"):
        getattr(ops, op)(**changed(lambda t: t.to("meta")))
    with pytest.raises(
        ValueError, match=r"`x` of shape \[2, 7, 6, 4\] has 7 channels and looks channels-last .* take 4"
    ):
        getattr(ops, op)(**changed(lambda t: t.permute(0, 2, 3, 1)))
    nested = changed(lambda t: torch.nested.nested_tensor([t[0], t[1]]))
    with pytest.raises(ValueError, match="`x` must be a dense tensor, got a nested tensor"):
        getattr(ops, op)(**nested)


@each_operator
def test_arguments_of_other_types(op: str) -> None:
    args, options = arguments(op)
    named = dict(zip(POSITIONAL[op], args, strict=True)) | options
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(TypeError, match=f"`{name}` must be a tensor, got a numpy.ndarray; `torch.from_numpy`"):
                getattr(ops, op)(**named | {name: value.numpy()})
            with pytest.raises(TypeError, match=f"`{name}` must be a tensor, got a list; `torch.tensor`"):
                getattr(ops, op)(**named | {name: value.tolist()})
    with pytest.raises(TypeError, match="`activation` must be of type str, got 1"):
        getattr(ops, op)(**named | {"activation": 1})
    if "stride" in named:
        with pytest.raises(TypeError, match=r"`stride` must be of type int, got 2\.5"):
            getattr(ops, op)(**named | {"stride": 2.5})


@each_operator
def test_missing_and_sparse_arguments(op: str) -> None:
    args, options = arguments(op)
    for i, name in enumerate(POSITIONAL[op]):
        for value, message in (
            (None, "a tensor, got None"),
            (args[i].to_sparse(), "a dense tensor, got torch.sparse_coo"),
        ):
            if value is None and name == "gate_bias":
                continue
            with pytest.raises(ValueError, match=f"`{name}` must be {message}"):
                run(op, [*args[:i], value, *args[i + 1 :]], options)


def test_mkldnn_map() -> None:
    args, options = arguments("repvgg_sse")
    with pytest.raises(ValueError, match=r"`x` must be a dense tensor, got torch\._mkldnn"):
        run("repvgg_sse", [args[0].to_mkldnn(), *args[1:]], options)


def test_odd_output_channels_of_fusion() -> None:
    args, options = arguments("fusion_se", k=5)
    with pytest.raises(ValueError, match="`weight` must have an even K, two groups, got K = 5"):
        run("fusion_se", args, options)


def test_unequal_channels_of_skip() -> None:
    args, options = arguments("repvgg_sse", c=4)
    args[1] = torch.zeros(6, 4, 3, 3)
    args[2] = args[6] = options["out_scale"] = options["out_shift"] = torch.zeros(6)
    args[5] = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="`weight` must have K = C = 4, the skip adds x, got K = 6"):
        run("repvgg_sse", args, options)


def test_use_backend() -> None:
    args, options = arguments("repvgg_sse", dtype=torch.float64)
    with ops.use_backend("reference"):
        run("repvgg_sse", args, options)
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run repvgg_sse: .*float64"):
        run("repvgg_sse", args, options)
    with pytest.raises(ValueError, match="backend must be one of"), ops.use_backend("tpu"):
        pass
    reasons = ops.explain("repvgg_sse", args[0])
    assert reasons["reference"] is None
    assert "float64" in reasons["cpu"]
