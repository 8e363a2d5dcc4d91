"""Exported, converted and traced models give the numbers of the layer they come from."""

import copy
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.fx.subgraph_rewriter import replace_pattern_with_filters
from torch.nn import functional

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, padding_mask, revert_batchnorm

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 in another order of operations
VARIANTS = {
    "default": {},
    "cumulative": {"momentum": None},
    "no-affine": {"affine": False},
    "no-running": {"track_running_stats": False},
    "ghost": {"virtual_batch_size": 2},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 3.0, "dmax": 5.0}},
    "relu": {"activation": "relu"},
}
variants = pytest.mark.parametrize("option", VARIANTS.values(), ids=VARIANTS)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

WARNING = "torch.export traces this layer in training"
pytestmark = [
    pytest.mark.sample(2),
    pytest.mark.filterwarnings(f"ignore:.*{WARNING}:UserWarning"),
]

onnx_warnings = [
    # torch.onnx and onnxscript use deprecated parts of torch, Python and each other.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
trace_warnings = [
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
    # A traced model keeps the shapes of its example; that is what tracing means.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def marked(marks):
    def apply(test):
        for mark in marks:
            test = mark(test)
        return test

    return apply


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(option, make=BatchNorm1d):
    layer = make(3, **option)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        if layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return layer


def assert_same_state(actual, expected):
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), **CLOSE)


# torch.export


@variants
@modes
def test_exported_layer_gives_the_same_output(option, training):
    layer = trained(option).train(training)
    program = export(copy.deepcopy(layer), (torch.randn(8, 3, 5),)).module()
    x = torch.randn(8, 3, 5)
    torch.testing.assert_close(program(x), layer(x), **CLOSE)


@variants
def test_exported_training_updates_the_same_statistics(option):
    layer = trained(option)
    program = export(copy.deepcopy(layer), (torch.randn(8, 3, 5),)).module()
    for _ in range(3):
        x = torch.randn(8, 3, 5)
        program(x), layer(x)
    assert_same_state(program, layer)


@variants
def test_exporting_leaves_the_layer_alone(option):
    layer = trained(option)
    before = copy.deepcopy(layer)
    export(layer, (torch.randn(8, 3, 5),))
    assert_same_state(layer, before)


@modes
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5)])
def test_exported_batch_size_may_be_dynamic(training, shape):
    layer = trained({}).train(training)
    dynamic = ({0: Dim("n", min=2)},)
    program = export(copy.deepcopy(layer), (torch.randn(shape),), dynamic_shapes=dynamic).module()
    x = torch.randn(21, *shape[1:])
    torch.testing.assert_close(program(x), layer(x), **CLOSE)


@modes
def test_exported_length_may_be_dynamic(training):
    layer = trained({}).train(training)
    dynamic = ({0: Dim("n", min=2), 2: Dim("l", min=2)},)
    program = export(copy.deepcopy(layer), (torch.randn(8, 3, 5),), dynamic_shapes=dynamic).module()
    x = torch.randn(4, 3, 11)
    torch.testing.assert_close(program(x), layer(x), **CLOSE)


def test_exported_number_of_ghost_batches_may_be_dynamic():
    layer = trained({"virtual_batch_size": 4})
    dynamic = ({0: 4 * Dim("groups", min=2)},)
    program = export(
        copy.deepcopy(layer), (torch.randn(12, 3, 5),), dynamic_shapes=dynamic
    ).module()
    x = torch.randn(20, 3, 5)
    torch.testing.assert_close(program(x), layer(x), **CLOSE)


@modes
def test_exported_mask_is_an_input(training):
    layer = trained({}).train(training)
    example = torch.randn(8, 3, 5), torch.rand(8, 5) < 0.6
    program = export(copy.deepcopy(layer), example).module()
    x, mask = torch.randn(8, 3, 5), torch.rand(8, 5) < 0.6
    torch.testing.assert_close(program(x, mask), layer(x, mask), **CLOSE)


@modes
def test_exported_mask_may_have_dynamic_sizes(training):
    layer = trained({}).train(training)
    n, length = Dim("n", min=2), Dim("l", min=2)
    program = export(
        copy.deepcopy(layer),
        (torch.randn(8, 3, 5), torch.rand(8, 5) < 0.6),
        dynamic_shapes=({0: n, 2: length}, {0: n, 1: length}),
    ).module()
    x, mask = torch.randn(4, 3, 9), torch.rand(4, 9) < 0.6
    torch.testing.assert_close(program(x, mask), layer(x, mask), **CLOSE)


def test_exported_residual_is_an_input():
    layer = trained({"activation": "leaky_relu"}).eval()
    example = torch.randn(8, 3), None, torch.randn(8, 3)
    program = export(copy.deepcopy(layer), example).module()
    x, residual = torch.randn(8, 3), torch.randn(8, 3)
    torch.testing.assert_close(program(x, None, residual), layer(x, None, residual), **CLOSE)


def test_exported_frozen_layer_keeps_its_statistics():
    layer = trained({}).freeze()
    program = export(copy.deepcopy(layer), (torch.randn(8, 3),)).module()
    program(torch.randn(8, 3))
    assert_same_state(program, layer)


def test_exported_program_survives_saving(tmp_path):
    layer = trained({}).eval()
    torch.export.save(export(copy.deepcopy(layer), (torch.randn(8, 3),)), tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(8, 3)
    torch.testing.assert_close(program(x), layer(x), **CLOSE)


def test_exported_evaluation_holds_no_custom_operator():
    program = export(trained({}).eval(), (torch.randn(8, 3),))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if name.startswith("batchnorm")]


def test_exporting_inside_padding_mask_raises():
    with padding_mask(torch.ones(8, dtype=torch.bool)), pytest.raises(ValueError, match="mask="):
        export(trained({}), (torch.randn(8, 3),))


# Programs of training that are switched to evaluation or quantized


class ConvNorm(nn.Module):
    def __init__(self, **option):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = trained(option, BatchNorm2d)

    def forward(self, x):
        return self.norm(self.conv(x))


class NormAlone(nn.Module):
    """A pattern like torchao's: functional batch norm in one mode."""

    def __init__(self, training):
        super().__init__()
        self.mode = training

    def forward(self, x, weight, bias, mean, var):
        return functional.batch_norm(x, mean, var, weight, bias, training=self.mode)


def move_to_eval(program):
    """The work of torchao's move_exported_model_to_eval, by the same parts of torch."""
    example = torch.randn(1, 1, 3, 3), *(torch.ones(1) for _ in range(4))
    patterns = []
    for training in (True, False):
        pattern = export(NormAlone(training), example).module()
        for node in list(pattern.graph.nodes):
            if node.name == "_guards_fn" or node.target is torch.ops.aten.copy_.default:
                pattern.graph.erase_node(node)
        pattern.graph.eliminate_dead_code()
        patterns.append(pattern)
    return replace_pattern_with_filters(program, *patterns, match_filters=[], ignore_literals=True)


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_export_in_training_says_what_to_do(strict):
    with pytest.warns(UserWarning, match=rf"^BatchNorm2d: {WARNING}.*revert_batchnorm\(model\)"):
        export(ConvNorm(), (torch.randn(4, 2, 5, 5),), strict=strict)


@pytest.mark.parametrize(
    "prepare",
    [lambda m: m.eval(), lambda m: m.norm.freeze(), lambda m: revert_batchnorm(m)],
    ids=["evaluation", "frozen", "reverted"],
)
@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_export_of_what_can_be_switched_says_nothing(prepare, strict):
    model = ConvNorm()
    prepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated")  # torch's own import
        export(model, (torch.randn(4, 2, 5, 5),), strict=strict)


def test_export_without_running_statistics_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(ConvNorm(track_running_stats=False), (torch.randn(4, 2, 5, 5),))


def test_reverted_model_exports_the_training_of_ours():
    model, x = ConvNorm(), torch.randn(4, 2, 5, 5)
    program = export(revert_batchnorm(copy.deepcopy(model)), (x,)).module()
    torch.testing.assert_close(program(x), model(x), **CLOSE)
    assert_same_state(program, model)


def test_reverted_program_moves_to_evaluation():
    model, x = ConvNorm(), torch.randn(4, 2, 5, 5)
    program = export(revert_batchnorm(copy.deepcopy(model)), (x,)).module()
    assert len(move_to_eval(program)) == 1
    program.recompile()
    torch.testing.assert_close(program(x), model.eval()(x), **CLOSE)


def test_program_of_our_training_has_nothing_to_move():
    program = export(ConvNorm(), (torch.randn(4, 2, 5, 5),)).module()
    assert not move_to_eval(program)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchao_moves_a_reverted_program_to_evaluation():
    pt2e = pytest.importorskip("torchao.quantization.pt2e", reason="torchao is not installed")
    model, x = ConvNorm(), torch.randn(4, 2, 5, 5)
    program = export(revert_batchnorm(copy.deepcopy(model)), (x,)).module()
    pt2e.move_exported_model_to_eval(program)
    torch.testing.assert_close(program(x), model.eval()(x), **CLOSE)


@pytest.mark.filterwarnings("ignore")  # torchao's imports and passes
def test_torchaos_training_aware_quantization_folds_the_norm_of_a_reverted_program():
    pt2e = pytest.importorskip("torchao.quantization.pt2e", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    x = torch.randn(4, 2, 5, 5)
    program = prepare_qat_pt2e(export(revert_batchnorm(ConvNorm()), (x,)).module(), quantizer)
    program(x)
    pt2e.move_exported_model_to_eval(program)
    targets = [str(node.target) for node in convert_pt2e(program).graph.nodes]
    assert not [name for name in targets if "batch_norm" in name]
    assert [name for name in targets if "quantize" in name]


# ONNX


class Net(nn.Module):
    def __init__(self, **option):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = trained(option, BatchNorm2d)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x, mask=None):
        return self.last(torch.relu(self.norm(self.first(x), mask)))


def run_onnx(model, example, arguments, path, **options):
    torch.onnx.export(model, example, path, dynamo=True, verbose=False, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    inputs = dict(zip(names, (a.numpy() for a in arguments), strict=True))
    return torch.from_numpy(session.run(None, inputs)[0])


@marked(onnx_warnings)
@pytest.mark.parametrize("name", ["default", "no-affine", "renorm", "relu"])
def test_onnx_model_gives_the_same_output(name, tmp_path):
    net = Net(**VARIANTS[name]).eval()
    example, x = torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6)
    y = run_onnx(net, (example,), (x,), tmp_path / "net.onnx")
    torch.testing.assert_close(y, net(x).detach(), **CLOSE)


@marked(onnx_warnings)
def test_onnx_batch_size_may_be_dynamic(tmp_path):
    net, example, x = Net().eval(), torch.randn(4, 2, 6, 6), torch.randn(7, 2, 6, 6)
    y = run_onnx(
        net,
        (example,),
        (x,),
        tmp_path / "net.onnx",
        dynamic_shapes=({0: Dim("n")},),
    )
    torch.testing.assert_close(y, net(x).detach(), **CLOSE)


@marked(onnx_warnings)
def test_onnx_model_of_own_statistics_gives_the_same_output(tmp_path):
    net = Net(track_running_stats=False).eval()
    example, x = torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6)
    y = run_onnx(net, (example,), (x,), tmp_path / "net.onnx")
    torch.testing.assert_close(y, net(x).detach(), **CLOSE)


@marked(onnx_warnings)
def test_onnx_mask_is_an_input(tmp_path):
    net = Net(track_running_stats=False).eval()  # a mask matters to own statistics only
    example = torch.randn(4, 2, 6, 6), torch.rand(4, 6, 6) < 0.6
    x, mask = torch.randn(4, 2, 6, 6), torch.rand(4, 6, 6) < 0.6
    y = run_onnx(net, example, (x, mask), tmp_path / "net.onnx")
    torch.testing.assert_close(y, net(x, mask).detach(), **CLOSE)


@marked(onnx_warnings)
def test_onnx_model_is_exact_at_an_offset(tmp_path):
    layer = BatchNorm1d(3, momentum=1.0)
    x = (torch.randn(64, 3, dtype=torch.float64) + 1e6).float()
    layer(x)
    y = run_onnx(layer.eval(), (torch.randn(64, 3),), (x,), tmp_path / "layer.onnx")
    np.testing.assert_allclose(y.numpy(), layer(x).detach().numpy(), **CLOSE)


# torch.jit.trace


@marked(trace_warnings)
@variants
def test_traced_evaluation_gives_the_same_output(option):
    layer = trained(option).eval()
    traced = torch.jit.trace(layer, (torch.randn(8, 3, 5),))
    x = torch.randn(8, 3, 5)
    torch.testing.assert_close(traced(x), layer(x), **CLOSE)


@marked(trace_warnings)
def test_traced_evaluation_takes_other_batch_sizes():
    layer = trained({}).eval()
    traced = torch.jit.trace(layer, (torch.randn(8, 3, 5),))
    x = torch.randn(11, 3, 5)
    torch.testing.assert_close(traced(x), layer(x), **CLOSE)


@marked(trace_warnings)
def test_traced_network_gives_the_same_output():
    net = Net().eval()
    traced = torch.jit.trace(net, (torch.randn(2, 2, 6, 6),))
    x = torch.randn(2, 2, 6, 6)
    torch.testing.assert_close(traced(x), net(x), **CLOSE)


@marked(trace_warnings)
def test_traced_layer_for_several_axes_gives_the_same_output():
    layer = BatchNorm((3, 5), axis=(1, 2)).eval()
    traced = torch.jit.trace(layer, (torch.randn(8, 3, 5),))
    x = torch.randn(8, 3, 5)
    torch.testing.assert_close(traced(x), layer(x), **CLOSE)
