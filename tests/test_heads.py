import copy
import gc
import pickle
import weakref

import pytest
import timm
import torch
import torchvision
from helpers import assert_close
from timm.models.resnetv2 import ResNetV2
from torch import nn

from fsr_wrap.heads import Head, resolve_head, unwrap
from fsr_wrap.tap import Capture, Tap


class Net(nn.Module):
    """A body, a layer beside the head, and a head."""

    def __init__(self, head: nn.Module | None = None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.fc = nn.Linear(6, 3) if head is None else head
        self.side = nn.Linear(6, 3)

    def forward(self, x, scale=1.0):
        return self.fc(self.body(x) * scale)


class Encoder(nn.Module):
    """The shape of a Hugging Face classifier: dropout, then `classifier`; a pooler that comes last."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        self.pooler = nn.Linear(6, 6)

    def forward(self, x):
        return {"logits": self.classifier(self.pooler(x))}


@pytest.fixture
def net():
    return Net()


# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fc", "module.fc", "_orig_mod.fc", "module._orig_mod.fc", "_orig_mod.module.fc"])
def test_by_name(net, name):
    assert resolve_head(net, name) == ("fc", net.fc)


def test_by_name_deep_down():
    net = Net(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    assert resolve_head(net, "module.fc.1") == ("fc.1", net.fc[1])
    inner = nn.Module()
    inner.module = Net()  # a part that happens to have the name
    assert resolve_head(inner, "module.fc") == ("module.fc", inner.module.fc)


def test_by_module(net):
    assert resolve_head(net, net.fc) == ("fc", net.fc)
    assert resolve_head(net, torch.compile(net.fc, backend="eager")) == ("fc", net.fc)
    with pytest.raises(ValueError, match=r"Linear is not a part of the model\..*'fc', 'side'"):
        resolve_head(net, nn.Linear(6, 3))


def test_what_is_not_there_names_candidates(net):
    with pytest.raises(ValueError, match=r"no module named 'classifier'\. .*\['body.0', 'fc', 'side'\]; pass head="):
        resolve_head(net, "classifier")
    with pytest.raises(ValueError, match=r"no module named 'fc\.weight'"):
        resolve_head(net, "fc.weight")
    with pytest.raises(TypeError, match="not int"):
        resolve_head(net, 3)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: timm.create_model("test_resnet", pretrained=False, num_classes=7), "fc"),
        (lambda: timm.create_model("test_vit", pretrained=False, num_classes=7), "head"),
        (lambda: timm.create_model("test_convnext", pretrained=False, num_classes=7), "head.fc"),
        (lambda: timm.create_model("test_nfnet", pretrained=False, num_classes=7), "head.fc"),
        (lambda: timm.create_model("test_mambaout", pretrained=False, num_classes=7), "head.fc"),
        (lambda: timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=7), "classifier"),
        (lambda: ResNetV2([1, 1, 1, 1], (128, 128, 128, 128), num_classes=7, stem_chs=32), "head.fc"),
        (lambda: torchvision.models.resnet18(num_classes=7), "fc"),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=7), "classifier.3"),
    ],
)
def test_auto_finds_the_head_of_a_real_model(make, name):
    """The logits are what the head gives at the feature that was caught."""
    model = make()
    found, module = resolve_head(model, "auto")
    assert found == name
    assert model.get_submodule(name) is module
    tap, head = Tap(model, module), Head(found, module)
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    capture = tap.find(logits)
    head.check(capture, logits)
    assert_close(head.logits(head.features(capture.features, torch.float32), torch.float32), logits.detach(), 1e-5)


def test_auto_sees_a_conv_classifier():
    model = ResNetV2([1, 1, 1, 1], (128, 128, 128, 128), num_classes=7, stem_chs=32)
    name, module = resolve_head(model, "auto")
    assert isinstance(module, nn.Conv2d)
    assert Head(name, module).is_linear


def test_auto_finds_a_classifier_by_its_name():
    model = Encoder()
    assert resolve_head(model, "auto") == ("classifier.2", model.classifier[2])


def test_auto_asks_the_model_first():
    model = Net()
    model.get_classifier = lambda: model.body[0]
    assert resolve_head(model, "auto") == ("body.0", model.body[0])


def test_auto_takes_the_last_linear_layer_else():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softplus())
    assert resolve_head(model, "auto") == ("2", model[2])
    assert resolve_head(nn.Linear(4, 3), "auto")[0] == ""


def test_auto_refuses_what_it_cannot_tell():
    headless = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    with pytest.raises(ValueError, match=r"num_classes > 0, .*or pass head="):
        resolve_head(headless, "auto")
    with pytest.raises(ValueError, match=r"No head was found in Sequential\. It has no linear layer; pass head="):
        resolve_head(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), "auto")


@pytest.mark.parametrize(
    ("conv", "linear"),
    [
        ({"kernel_size": 1}, True),
        ({"kernel_size": 1, "padding": "same"}, True),
        ({"kernel_size": 3}, False),
        ({"kernel_size": 1, "stride": 2}, False),
        ({"kernel_size": 1, "groups": 2}, False),
        ({"kernel_size": 1, "padding": 1}, False),
    ],
)
def test_which_convolutions_are_linear(conv, linear):
    assert Head("head", nn.Conv2d(4, 6, **conv)).is_linear == linear


def test_subclasses_of_linear_take_the_general_path():
    class Cosine(nn.Linear):
        def forward(self, x):
            return nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T

    module = Cosine(6, 3, bias=False)
    head, features = Head("fc", module), torch.randn(5, 6)
    assert not head.is_linear
    assert_close(head.logits(features, features.dtype), module(features).detach())


# --- wrapped models --------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_unwrap(net, process_group):
    parallel = nn.parallel.DistributedDataParallel(net)
    compiled = torch.compile(net, backend="eager")
    both = torch.compile(parallel, backend="eager")
    other = nn.parallel.DistributedDataParallel(compiled)
    for model in (net, parallel, compiled, both, other):
        assert unwrap(model) is net
    assert resolve_head(net, parallel.module.fc)[0] == "fc"


@pytest.mark.parametrize("wrap", ["ddp", "compile"])
def test_the_tap_sees_forwards_of_a_wrapped_model(net, process_group, wrap):
    tap = Tap(net, net.fc)
    model = nn.parallel.DistributedDataParallel(net) if wrap == "ddp" else torch.compile(net, backend="eager")
    x = torch.randn(5, 4)
    logits = model(x)
    assert_close(tap.find(logits).features, net.body(x).detach())


def test_unwrap_leaves_other_modules_alone():
    inner = nn.Module()
    inner.module = Net()
    assert unwrap(inner) is inner


def test_data_parallel_is_refused(net):
    with pytest.raises(TypeError, match="use DistributedDataParallel"):
        unwrap(nn.DataParallel(net))


# --- catching --------------------------------------------------------------------------------------------------------


def test_the_right_forward_is_found(net):
    tap = Tap(net, net.fc)
    first, second, short = torch.randn(5, 4), torch.randn(5, 4), torch.randn(2, 4)
    outputs = [net(x) for x in (first, second, short)]
    for x, logits in zip((first, second, short), outputs, strict=True):
        capture = tap.find(logits)
        assert_close(capture.features, net.body(x).detach())
        assert_close(capture.output, logits.detach(), 0.0)
        assert capture.args[0] is x
        assert not capture.features.requires_grad
        assert not capture.output.requires_grad


def test_logits_that_were_copied_are_known_by_their_size_or_else_by_their_values(net):
    tap = Tap(net, net.fc)
    short, outputs = torch.randn(2, 4), [net(torch.randn(5, 4)) for _ in range(2)]
    net(short)
    for output in outputs:
        assert tap.find(output.half()).output.data_ptr() == output.data_ptr()
    assert tap.find(outputs[0] * 2) is None
    assert tap.find(torch.zeros(2, 3)).args[0] is short
    assert tap.find(torch.zeros(4, 3)) is None


def test_forwards_without_gradients_are_not_seen(net):
    tap = Tap(net, net.fc)
    x = torch.randn(5, 4)
    logits = net(x)
    with torch.no_grad():
        net(torch.randn(5, 4))
    with torch.inference_mode():
        net(torch.randn(5, 4))
    assert tap.find(torch.zeros(5, 3)).output.data_ptr() == logits.data_ptr()


def test_two_forwards_then_two_losses(net):
    tap = Tap(net, net.fc)
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    first, second = net(x), net(y)
    tap.discard(tap.find(first), first)
    assert tap.find(first) is None
    capture = tap.find(second)
    assert_close(capture.features, net.body(y).detach())
    assert capture.args[0] is y
    tap.discard(capture, second)
    assert tap.find(second) is None


def test_memory_is_bounded(net):
    tap, inputs = Tap(net, net.fc), []
    for _ in range(30):
        x = torch.randn(5, 4)
        inputs.append(weakref.ref(x))
        net(x)
    del x
    gc.collect()
    assert sum(ref() is not None for ref in inputs) <= 8
    logits = net(inputs[-1]())
    tap.discard(tap.find(logits), logits)
    del logits
    gc.collect()
    assert all(ref() is None for ref in inputs)


def test_arguments_and_autocast_are_kept(net):
    tap = Tap(net, net.fc)
    x = torch.randn(5, 4)
    capture = tap.find(net(x, scale=2.0))
    assert (capture.args, capture.kwargs, capture.autocast) == ((x,), {"scale": 2.0}, None)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    capture = tap.find(logits)
    assert capture.autocast == torch.bfloat16
    assert capture.features.dtype == capture.output.dtype == torch.bfloat16
    Head("fc", net.fc).check(capture, logits)


def test_divert(net):
    """Extra forwards are caught apart, with or without gradients, and the user's own stay."""
    tap = Tap(net, net.fc)
    x, extra = torch.randn(5, 4), torch.randn(5, 4)
    logits = net(x)
    with tap.divert() as box, torch.no_grad():
        net(extra)
    assert_close(box[0].features, net.body(extra).detach())
    assert tap.find(torch.zeros(5, 3)).output.data_ptr() == logits.data_ptr()
    with tap.divert() as box:
        pass
    assert box == []
    with pytest.raises(RuntimeError), tap.divert():
        raise RuntimeError
    with torch.no_grad():
        net(extra)
    assert tap.find(torch.zeros(5, 3)).args[0] is x
    assert_close(tap.find(net(extra)).features, net.body(extra).detach())


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_hooked_model_works_alone(net, make):
    tap = Tap(net, net.fc)
    logits = net(torch.randn(5, 4))
    twin = make(net)
    x = torch.randn(5, 4)
    out = twin(x)
    assert tap.find(torch.zeros(5, 3)).output.data_ptr() == logits.data_ptr()
    assert_close(out, net(x))
    out.sum().backward()
    assert net.fc.weight.grad is None
    assert make(twin)(x).shape == (5, 3)


def test_the_tap_comes_off_and_changes_nothing(net):
    x = torch.randn(5, 4)
    before = net(x)
    tap = Tap(net, net.fc)
    assert_close(net(x), before, 0.0)
    tap.remove()
    parts = (net, net.fc)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    tap.remove()


# --- checking --------------------------------------------------------------------------------------------------------


def check(model: nn.Module, module: nn.Module, name: str, scale: float = 1.0, x: torch.Tensor | None = None) -> bool:
    tap = Tap(model, module)
    out = model(torch.randn(5, 4) if x is None else x)
    logits = out * scale
    return Head(name, module).check(tap.find(out) or tap.find(logits), logits)


def test_the_right_head_passes(net):
    check(net, net.fc, "fc")
    check(net.double(), net.fc, "fc", x=torch.randn(5, 4, dtype=torch.float64))


def test_a_wrong_head_is_refused_with_advice(net):
    with pytest.raises(
        ValueError, match=r"^The head 'body.0' \(Linear\) puts out \(5, 6\), but the logits are \(5, 3\).*head=\"dotted"
    ):
        check(net, net.body[0], "body.0")
    with pytest.raises(ValueError, match=r"^The head 'fc' \(Linear\) gives other logits .*gap 0.5.*before any scaling"):
        check(net, net.fc, "fc", scale=2.0)
    assert check(net, net.fc, "fc")
    assert not check(net, net.fc, "fc", scale=float("nan"))  # nothing to be seen yet


def test_a_head_over_positions_is_refused():
    class Segments(Net):
        def forward(self, x):
            return self.fc(self.body(x)).flatten(1)

    model = Segments()
    with pytest.raises(ValueError, match=r"takes \(5, 2, 6\): one feature vector a sample is needed.*pooled feature"):
        check(model, model.fc, "fc", x=torch.randn(5, 2, 4))


def test_a_head_that_is_not_a_function_of_its_input_is_refused():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.calls = nn.Linear(6, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.fc(x) * self.calls

    model = Net(Doubling())
    with pytest.raises(ValueError, match=r"'fc' \(Doubling\) gives other logits"):
        check(model, model.fc, "fc")


def test_half_precision_is_compared_coarsely(net):
    x = torch.randn(5, 4)
    capture = Capture(net.body(x).detach(), net(x).detach())
    head = Head("fc", net.fc)
    head.check(capture, (1.05 * capture.output).bfloat16())
    with pytest.raises(ValueError, match="gives other logits"):
        head.check(capture, (1.2 * capture.output).bfloat16())
    with pytest.raises(ValueError, match="gives other logits"):
        head.check(capture, 1.05 * capture.output)


def test_dropout_in_the_head_is_off_for_the_meta_arithmetic_only():
    model = Net(nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3), nn.AlphaDropout(0.5)))
    head = Head("fc", model.fc)
    check(model, model.fc, "fc")
    features = torch.randn(5, 6)
    state = torch.get_rng_state()
    assert_close(head.logits(features, features.dtype), model.fc[1](features).detach())
    assert_close(torch.get_rng_state(), state, 0.0)
    assert all(module.training for module in model.modules())
    model.fc[0].eval()
    head.logits(features, features.dtype)
    assert not model.fc[0].training
    assert model.fc[2].training


def test_batch_norm_in_the_head_runs_as_in_the_forward():
    model = Net(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    for training in (True, False):
        model.train(training)
        check(model, model.fc, "fc")
    before = copy.deepcopy(model.state_dict())
    model.train()
    Head("fc", model.fc).logits(torch.randn(5, 6), torch.float32)
    assert_close(model.state_dict(), before, 0.0)


def test_a_conv_head_is_flat_in_the_meta_arithmetic():
    class Conv(Net):
        def forward(self, x):
            return self.fc(self.body(x)[..., None, None]).flatten(1)

    model = Conv(nn.Conv2d(6, 3, 1))
    check(model, model.fc, "fc")
    head, x = Head("fc", model.fc), torch.randn(5, 4)
    features = head.features(model.body(x)[..., None, None].detach(), torch.float64)
    assert features.shape == (5, 6)
    assert features.dtype == torch.float64
    assert_close(
        {name: value.shape for name, value in head.params(torch.float64).items()}, {"weight": (3, 6), "bias": (3,)}
    )
    assert_close(head.logits(features, features.dtype), model(x).detach())
    assert model.fc.weight.shape == (3, 6, 1, 1)
