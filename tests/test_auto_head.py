"""head="auto" on the architectures of timm and Hugging Face."""

import ast
import os
import re
from collections import OrderedDict

import pytest
import timm
import torch
from helpers import CLIP, assert_close, judge_soon, slow_meta_step
from torch import nn

from fsr_wrap import FSRWrapper
from fsr_wrap.heads import Batch, GradientStep, Head, KernelStep, Mean, Reward, resolve_head
from fsr_wrap.tap import Tap, take_rows

CLASSES = 5
CONFIG = {**CLIP, "dictionary_size": 5, "reward_batch_size": 10}
KEPT = {"cached": CONFIG, "fresh": {**CONFIG, "reward": "fresh"}, "nothing": {}}  # of what the model takes


def train(model: nn.Module, inputs, head="auto", steps: int = 3, config=CONFIG) -> FSRWrapper:
    """An epoch, then some steps that re-weight, each with weights that are not uniform; returns the wrapper."""
    samples = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    index, target = torch.arange(samples), torch.arange(samples) % CLASSES
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    fsr = FSRWrapper(model, optimizer, head=head, num_samples=samples, **config)
    judge_soon(fsr, CLASSES, share=0.6)
    for step in range(1 + steps):
        assert fsr.is_reweighting == (step > 0 or fsr.config.selects)
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        fsr.loss(out, target, index).backward()
        fsr.step()
        fsr.zero_grad()
        assert fsr.weights.isfinite().all()
        if step > 0 or not fsr.config.selects:  # else some are held out
            assert (fsr.weights.max() - fsr.weights.min() > 1e-4) == (step > 0)
    return fsr


# --- several classifiers ---------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two branches, each with its classifier, named as in a distilled model."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 3)
        self.head, self.head_dist = nn.Linear(6, CLASSES), nn.Linear(3, CLASSES, bias=bias)

    def forward(self, x):
        return (self.head(self.first(x).tanh()) + self.head_dist(self.second(x).tanh())) / 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lr", [0.5, 0.0])
def test_the_mean_of_two_linear_heads_is_exact(bias, lr):
    """Against double back-propagation through the parameters of both, as the model has them."""
    model = Branches(bias).double()
    module = Mean([model.head, model.head_dist])
    names = [name for name, _ in module.named_parameters()]

    def forward(params, h):
        outputs = [h[:, :6] @ params["0.weight"].T, h[:, 6:] @ params["1.weight"].T]
        outputs = [out + params.get(f"{i}.bias", 0) for i, out in enumerate(outputs)]
        return (outputs[0] + outputs[1]) / 2

    params = {name: value.detach() for name, value in module.named_parameters()}
    assert len(names) == 3 + bias
    b, q = 7, 9
    rows, target = torch.randn(b, 9, dtype=torch.float64), torch.randint(CLASSES, (b,))
    reward, answers = torch.randn(q, 9, dtype=torch.float64), torch.randint(CLASSES, (q,))
    expected = slow_meta_step(forward, params, (rows, target), (reward, answers), lr=lr or 1e-9)

    head = Head("head + head_dist", module)
    assert head.is_linear
    assert head.num_classes == CLASSES
    phi, features = head.params(torch.float64), head.features(rows, torch.float64)
    logits = head.call(phi, features)
    assert_close(logits, forward(params, rows), 1e-12)
    residual = logits.softmax(1) - torch.eye(CLASSES, dtype=torch.float64)[target]
    batch = Batch(features, target, residual)
    steps = [GradientStep(head, batch, lr, phi, head.batch_gradient(phi, batch), b)]
    if lr:
        steps.append(KernelStep(head, batch, lr, phi, b, b))
    for step in steps:
        scores, loss = step.scores(Reward(head.features(reward, torch.float64), answers, 0.0, q))
        assert_close(scores * (1 if lr else 1e-9), expected[0], 1e-10)
        assert_close(loss, expected[1], 1e-7)
        if lr:
            ahead = forward(expected[2], reward)
            where = head.features(reward, torch.float64)
            assert_close(step.logits(where, head.call(phi, where)), ahead, 1e-10)


@pytest.mark.parametrize("kept", KEPT)
def test_two_classifiers_train_as_one_head(kept):
    fsr = train(Branches(), torch.randn(20, 4), config=KEPT[kept])
    assert fsr.head == "head + head_dist"


def test_two_classifiers_of_a_compiled_model_of_a_copy_and_with_mixup():
    import copy

    model = Branches()
    train(torch.compile(model, backend="eager"), torch.randn(20, 4))
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=20, **CONFIG)
    model, fsr = copy.deepcopy((model, fsr))
    index, y = torch.arange(20), torch.arange(20) % CLASSES
    for _ in range(3):
        mixed, soft = fsr.mixup(torch.randn(20, 4), y)
        fsr.loss(model(mixed), soft, index).backward()
    assert fsr.is_reweighting
    assert fsr.weights.max() > fsr.weights.min()


def test_one_of_two_classifiers_is_refused_with_advice_and_trains_by_name():
    model = Branches()
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=20, **CONFIG)
    caught = []
    model.head.register_forward_hook(lambda module, args, output: caught.append(output))
    model(torch.randn(20, 4))
    with pytest.raises(
        ValueError, match=r"'head \+ head_dist'.*mean of these classifiers.*set_distilled_training\(Fal"
    ):
        fsr.loss(caught[0], torch.arange(20) % CLASSES, torch.arange(20))


def test_a_list_of_modules_is_no_head():
    model = Branches()
    model.heads = nn.ModuleList([model.head, model.head_dist])
    with pytest.raises(
        ValueError, match=r"'heads' is a ModuleList, which has no forward: pass one of its modules.*auto"
    ):
        FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), head="heads")


def test_a_distilled_model_of_timm_in_distilled_training():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, depth=1, img_size=32)
    model.set_distilled_training(True)
    y, index = torch.arange(4), torch.arange(4)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=20, **CONFIG)
    outputs = model(torch.randn(4, 3, 32, 32))
    with pytest.raises(TypeError, match=r"it got tuple\. Pick the logits out of it"):
        fsr.loss(outputs, y, index)
    with pytest.raises(ValueError, match=r"set_distilled_training\(False\)"):
        fsr.loss(outputs[0], y, index)
    fsr.loss((outputs[0] + outputs[1]) / 2, y, index).backward()
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), head="head", num_samples=20, **CONFIG)
    fsr.loss(model(torch.randn(4, 3, 32, 32))[0], y, index).backward()


# --- timm ------------------------------------------------------------------------------------------------------------

# Names of which no part is a classifier to be found; the others resolve.
WITHOUT_CLASSIFIER = "no classifier: create it with num_classes > 0"
NOT_A_MEAN = r"logits are not their plain mean: pass head=\['"
SPECIAL = {
    "efficientvim_m1": NOT_A_MEAN,
    "efficientvim_m1_dist": NOT_A_MEAN,
    "volo_d1_224": NOT_A_MEAN,
    "aimv2_1b_patch14_224": WITHOUT_CLASSIFIER,
    "qwen3_vit_88m_enc": WITHOUT_CLASSIFIER,
    "samvit_base_patch16": WITHOUT_CLASSIFIER,
    "mobilenetv5_300m_enc": WITHOUT_CLASSIFIER,
    "vit_tiny_patch16_224": "head",
    "resnet18": "fc",
    "resnetv2_18": "head.fc",
    "mobilenetv3_small_050": "classifier",
    "levit_128s": "head.linear + head_dist.linear",
    "levit_conv_128s": "head.linear + head_dist.linear",
    "efficientformer_l1": "head + head_dist",
    "efficientformerv2_s0": "head + head_dist",
    "swiftformer_xs": "head + head_dist",
    "pit_ti_distilled_224": "head + head_dist",
    "deit_tiny_distilled_patch16_224": "head + head_dist",
    "repvit_m0_9": "head.head.l + head.head_dist.l",
    "iformer_m_distilled": "head.head.l + head.head_dist.l",
    "iformer_t": "head.head.l",
    "crossvit_9_240": "head.0 + head.1",
    "resnet50_clip": "head.proj",
    "caformer_s18": "head.fc.fc2",
}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def said(model: nn.Module) -> str:
    """The error that "auto" raises for this model, if any."""
    try:
        resolve_head(model, "auto")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", SPECIAL)
def test_timm_by_family(name):
    expected = SPECIAL[name]
    if " " in expected and "+" not in expected:
        with pytest.raises(ValueError, match=expected):
            resolve_head(on_meta(name), "auto")
    else:
        assert resolve_head(on_meta(name), "auto")[0] == expected


def test_every_architecture_of_timm_resolves_or_says_what_to_pass():
    """One of a hundred of the registry; all of them (6 minutes) with FSR_ALL_MODELS=1."""
    names = timm.list_models()
    assert len(names) > 1000
    if not os.environ.get("FSR_ALL_MODELS"):
        names = names[::100]
    resolved, refused = 0, []
    for name in names:
        model = on_meta(name)
        advised = re.search(f"{WITHOUT_CLASSIFIER}|{NOT_A_MEAN}", message := said(model))
        assert advised or not message, message
        if advised:
            refused.append(name)
            continue
        resolved += 1
        head = Head(*resolve_head(model, "auto"))
        assert head.is_linear
        assert head.num_classes == model.num_classes
    print(f"{resolved} of {len(names)} resolve; {len(refused)} say what to pass: {refused}")
    assert resolved > len(names) // 2


TINY = {
    "test_resnet": {},
    "test_vit": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "deit_tiny_distilled_patch16_224": {"depth": 1, "img_size": 32},
    "pit_ti_distilled_224": {"depth": (1, 1, 1), "img_size": 64},
    "levit_128s": {"depth": (1, 1, 1), "img_size": 64},
    "levit_conv_128s": {"depth": (1, 1, 1), "img_size": 64},
    "efficientformer_l1": {"depths": (1, 1, 1, 1)},
    "efficientformerv2_s0": {"depths": (1, 1, 1, 1), "img_size": 64},
    "swiftformer_xs": {"layers": (1, 1, 1, 1)},
    "repvit_m0_9": {"depth": (1, 1, 1, 1)},
    "crossvit_9_240": {"depth": ((1, 1, 0),)},
}


@pytest.mark.parametrize("kept", ["cached", "nothing"])
@pytest.mark.parametrize("name", TINY)
def test_timm_trains(name, kept):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **TINY[name])
    size = TINY[name].get("img_size") or {"efficientformer_l1": 224, "crossvit_9_240": 240}.get(name, 64)
    train(model, torch.randn(10, 3, size, size), steps=1, config=KEPT[kept])


def test_a_learned_mixture_trains_with_the_list_that_the_error_names():
    torch.manual_seed(0)
    model = timm.create_model("efficientvim_m1", pretrained=False, num_classes=CLASSES)
    found = re.search(r"head=(\[.*?\])", said(model))
    heads = ast.literal_eval(found[1])
    assert heads == ["heads.0", "heads.1", "heads.2", "heads.3"]
    train(model, torch.randn(10, 3, 64, 64), head=heads, steps=1)


# --- Hugging Face ----------------------------------------------------------------------------------------------------

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30,
    "num_labels": CLASSES,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}
NARROW = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 16], "num_labels": CLASSES, "image_size": 32}
FEW_KEYS = {**TEXT, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
SWIN |= {"image_size": 32, "num_labels": CLASSES}
LEVIT = {"image_size": 64, "hidden_sizes": [16] * 3, "depths": [1] * 3, "num_attention_heads": [2] * 3}

# Class of the model: class of its configuration, what that takes, the head.
DECODERS = {
    "GPT2ForSequenceClassification": ("GPT2Config", {**TEXT, **GPT2}, "score"),
    "LlamaForSequenceClassification": ("LlamaConfig", TEXT, "score"),
    "MistralForSequenceClassification": ("MistralConfig", FEW_KEYS, "score"),
    "Qwen2ForSequenceClassification": ("Qwen2Config", FEW_KEYS, "score"),
    "Qwen3ForSequenceClassification": ("Qwen3Config", {**FEW_KEYS, "head_dim": 8}, "score"),
}
HUGGING_FACE = {
    **DECODERS,
    "BertForSequenceClassification": ("BertConfig", TEXT, "classifier"),
    "RobertaForSequenceClassification": ("RobertaConfig", TEXT, "classifier.out_proj"),
    "DistilBertForSequenceClassification": ("DistilBertConfig", {**TEXT, **DISTIL}, "classifier"),
    "ModernBertForSequenceClassification": (
        "ModernBertConfig",
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
        "classifier",
    ),
    "T5ForSequenceClassification": ("T5Config", {**TEXT, **T5}, "classification_head.out_proj"),
    "ViTForImageClassification": ("ViTConfig", IMAGE, "classifier"),
    "Dinov2ForImageClassification": ("Dinov2Config", IMAGE, "classifier"),
    "ConvNextForImageClassification": ("ConvNextConfig", NARROW, "classifier"),
    "SwinForImageClassification": ("SwinConfig", SWIN, "classifier"),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", IMAGE, "cls_classifier + distillation_classifier"),
    "SwiftFormerForImageClassification": (
        "SwiftFormerConfig",
        {"depths": [1] * 4, "embed_dims": [8] * 4, "image_size": 64, "num_labels": CLASSES},
        "head + dist_head",
    ),
    "LevitForImageClassificationWithTeacher": (
        "LevitConfig",
        {**LEVIT, "key_dim": [8] * 3, "num_labels": CLASSES},
        "classifier.linear + classifier_distill.linear",
    ),
}


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, values, _ = HUGGING_FACE[name]
    if not all(hasattr(transformers, one) for one in (name, config)):
        pytest.skip(f"this version of transformers has no {name}")
    return getattr(transformers, name)(getattr(transformers, config)(**values))


def texts(side: str = "right", samples: int = 20, length: int = 7) -> dict[str, torch.Tensor]:
    """Texts of three to six tokens, each with its end token last; 0 is the padding."""
    ids = torch.randint(3, 30, (samples, length))
    for i, row in enumerate(ids):
        end = 3 + i % 4
        row[end:], row[end - 1] = 0, 2
    if side == "left":
        ids = ids.flip(1)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_trains(name, kept):
    model = hugging_face(name)
    size = HUGGING_FACE[name][1].get("image_size")
    inputs = {"pixel_values": torch.randn(20, 3, size, size)} if size else texts()
    fsr = train(model, inputs, config=KEPT[kept])
    assert fsr.head == HUGGING_FACE[name][2]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_features_of_a_decoder_are_those_of_the_token_that_it_takes(name, side):
    model = hugging_face(name).eval()
    tap, inputs = Tap(model, model.score), texts(side)
    logits = model(**inputs).logits
    hidden = model.base_model(**inputs).last_hidden_state
    last = (inputs["attention_mask"] * torch.arange(7)).argmax(1)
    expected = hidden[torch.arange(20), last].detach()
    for given in (logits, logits.clone(), logits.double(), logits.bfloat16()):
        rows = take_rows(tap.find(given), given)
        assert_close(rows.features, expected, 1e-5)
        assert_close(rows.output, logits.detach(), 0.0)


class Tokens(nn.Module):
    """A head on every token, then what is made of its outputs."""

    def __init__(self, pool):
        super().__init__()
        self.body, self.fc, self.pool = nn.Linear(4, 6), nn.Linear(6, CLASSES), pool

    def forward(self, x):
        return self.pool(self.fc(self.body(x).tanh()))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("take", [0, -1])
def test_one_token_of_any_model(take, kept):
    """As if the model had taken the token before its head."""
    torch.manual_seed(0)
    model, x = Tokens(lambda logits: logits[:, take]), torch.randn(20, 3, 4)
    twin = nn.Sequential(OrderedDict(body=nn.Linear(4, 6), tanh=nn.Tanh(), fc=nn.Linear(6, CLASSES)))
    twin.load_state_dict(model.state_dict())
    found, expected = (train(*pair, "fc", config=KEPT[kept]) for pair in ((model, x), (twin, x[:, take])))
    assert_close(found.weights, expected.weights, 1e-4)
    assert_close(found.scores, expected.scores, 1e-4)


def test_two_forwards_of_a_decoder_then_two_losses():
    model = Tokens(lambda logits: logits[:, -1])
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=20, **CONFIG)
    outputs = [model(torch.randn(5, 3, 4)) for _ in range(2)]
    for i, out in enumerate(outputs):
        fsr.loss(out, torch.arange(5), torch.arange(5) + 5 * i).backward()


def test_logits_of_tokens_that_are_pooled_or_all_alike_are_refused():
    def loss(model):
        fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), head="fc", num_samples=20, **CONFIG)
        return fsr.loss(model(torch.randn(5, 3, 4)), torch.arange(5), torch.arange(5))

    with pytest.raises(ValueError, match=r"'fc' puts out the logits of 3 tokens .*pool the features before the head"):
        loss(Tokens(lambda logits: logits.mean(1)))
    model = Tokens(lambda logits: logits[:, -1])
    nn.init.zeros_(model.fc.weight)
    with pytest.raises(ValueError, match=r"'fc' gives different tokens .*do not start with a head of zeros"):
        loss(model)


# --- segmentation and tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 7, 3)])
def test_outputs_of_more_dimensions_are_refused(shape):
    model = nn.Linear(4, 3)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=8, dictionary_size=2)
    with pytest.raises(
        ValueError, match=r"FSR weighs whole samples.*pool its features before the head.*pixel or token"
    ):
        fsr.loss(torch.zeros(shape, requires_grad=True), torch.zeros(2, dtype=torch.int64), torch.arange(2))
