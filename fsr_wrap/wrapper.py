"""FSRWrapper: the optimizer's face, epochs, metrics and state."""

from __future__ import annotations

import difflib
import functools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from . import carry, cleaning, distributed, functional, issues
from .checks import as_logits, warn
from .config import FSRConfig, Overrides, check_names
from .data import class_names, first_difference, sample_counts
from .dictionary import RewardDictionary
from .groups import check_alike, find_group
from .heads import Head, check_parallelism, resolve_part, unwrap
from .memory import METRICS, Memory
from .reminders import Reminders
from .state import read_state, write_state
from .step import Reweighting

if TYPE_CHECKING:
    from numpy import ndarray
    from pandas import DataFrame
    from typing_extensions import Unpack


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _in_group(method: Callable[Concatenate[Any, _P], _T]) -> Callable[Concatenate[Any, _P], _T]:
    """The method, run in the wrapper's process group. Whatever may ask another process goes through it."""

    @functools.wraps(method)
    def inside(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with distributed.within(self._group.processes):
            return method(self, *args, **kwargs)

    return inside


class FSRWrapper(Optimizer):
    """Wraps an optimizer so that training with it is robust to wrong labels and long-tailed classes (FSR).

    ```python
    train_set = with_index(train_set)
    optimizer = FSRWrapper(model, optimizer, head="fc", dataset=train_set)
    for x, y, index in loader:
        loss = optimizer.loss(model(x), y, index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ```

    It is an optimizer to everything that takes one: `param_groups`, `state` and `defaults` are the inner optimizer's
    own. All of FSR happens inside [`loss`][fsr_wrap.FSRWrapper.loss], nothing in `step`.

    **Arguments:**

    - `model`: the model that is trained, as it is or inside DDP or torch.compile.
    - `optimizer`: any `torch.optim.Optimizer`, also one that Accelerate prepared.
    - `head`: Θ^meta, the part that takes the look-ahead step: a module of the model or its dotted name; `"auto"` finds
        the classifier of timm and Hugging Face models, else the last linear layer. A list of modules or names, or
        `"all"`, makes a deeper Θ^meta (Figure 4, right): the dictionary then holds the model's inputs, and a step costs
        several times a plain one. With `lookahead_lr=0` that is L2R's meta-gradient, without second order.
    - `dataset`: the training set, for its length (see [`with_index`][fsr_wrap.with_index]). `column`: where a Hugging
        Face data set has its indices, if `with_index` was given another name.
    - `num_samples`: N, if there is no data set to give: indices lie in [0, N).
    - `samples_per_epoch`: how many samples an epoch consumes, over all processes. The data set's length if not given.
        Give it where a sampler or `drop_last` makes an epoch of another length. Without any of the three, call
        [`end_epoch`][fsr_wrap.FSRWrapper.end_epoch].
    - `process_group`: the processes that train this model together; those of DDP or of FSDP2's mesh if not given, else
        all. Where each process trains a model of its own: `dist.new_group([dist.get_rank()],
        use_local_synchronization=True)`. Copies share it. It cannot be pickled: what is unpickled is about all
        processes.
    - `config`: an [`FSRConfig`][fsr_wrap.FSRConfig]; `overrides` set single fields of it.

    **Raises:** `ValueError` if the head is not found, a value is out of range, samples of the data set are known to
    share their index, or the process group is not the model's own or lacks this process; `TypeError` for an unknown
    field, a wrong type, a loader in place of a data set or a kind of parallelism that is not supported
    (nn.DataParallel, FSDP1, DeepSpeed, tensor parallel). Model and optimizer are then as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        head: str | nn.Module | Sequence[str | nn.Module] = "auto",
        *,
        dataset: Any = None,
        column: str = "index",
        num_samples: int | None = None,
        samples_per_epoch: int | None = None,
        process_group: Any = None,
        config: FSRConfig | None = None,
        **overrides: Unpack[Overrides],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
        inner: Any = optimizer  # Accelerate's is one around it
        while inner is not None:
            if isinstance(inner, FSRWrapper):
                raise TypeError("optimizer is an FSRWrapper already: use it as it is, or wrap its .optimizer anew.")
            inner = getattr(inner, "optimizer", None)
        if config is not None and not isinstance(config, FSRConfig):
            raise TypeError(f"config must be an FSRConfig, not {type(config).__name__}.")
        for name, value in (("num_samples", num_samples), ("samples_per_epoch", samples_per_epoch)):
            if value is not None and (not hasattr(value, "__index__") or value < 1):
                raise ValueError(f"{name}={value!r} is not allowed: give an integer >= 1 or None.")
        num_samples, samples_per_epoch = (
            None if number is None else operator.index(number) for number in (num_samples, samples_per_epoch)
        )
        config = replace(config or FSRConfig(), **check_names(overrides))
        rows, length = (None, None) if dataset is None else sample_counts(dataset, column)
        core = unwrap(model)
        check_parallelism(core)
        head_parts = resolve_part(core, head)
        group = find_group(model, process_group)
        total = num_samples or rows
        if config.weight_rule == "clip" and total is not None and 2 * config.dictionary_size > total:
            warn(
                f"dictionary_size={config.dictionary_size} is more than half of the {total} samples, so the dictionary "
                f"cannot leave the wrong labels out: pass about dictionary_size={max(1, total // 10)}.",
            )

        self.optimizer = optimizer
        self.config = config
        self._group = group
        self._reweighting = Reweighting(core, Head(*head_parts), config, Memory(config, total, length))
        self._column = column
        self._samples_per_epoch = samples_per_epoch or length or num_samples
        self._memory.class_names = None if dataset is None else class_names(dataset)
        self._reminders = Reminders(self._samples_per_epoch, told=samples_per_epoch is not None)
        self._warned = self._warned_of_state = False
        self._alike = False  # whether the processes are known to be

    # --- the step ----------------------------------------------------------------------------------------------------

    @_disable_dynamo  # torch.compiler.disable would import dynamo, which takes seconds, with this package
    @_in_group
    def loss(self, logits: Any, target: Tensor, index: Tensor, label: Tensor | None = None) -> Tensor:
        """The loss to back-propagate, in place of cross-entropy.

        By default Σ ω_i ℓ_i, with what is missing of each weight on the sample's averaged prediction, and the
        regulariser (see the docs). Under the paper's rules Σ ω_i ℓ_i + p · mean CE(ŷ_i, f(x_i)) (Section 4.3).

        It also values the batch, offers it to the dictionary and counts the epoch; it leaves gradients, RNG streams,
        BatchNorm statistics and train/eval flags alone. Without gradients (`torch.no_grad()`) it is the plain mean
        cross-entropy and leaves no trace.

        **Arguments:**

        - `logits`: (b, C) as they leave the model, or a Hugging Face model output that has `logits`.
        - `target`: (b,) int64 class numbers, or (b, C) soft targets, from `mixup` or your own: rows of values in [0, 1]
            that sum to 1, up to 0.02.
        - `index`: (b,) integers, the samples' indices in [0, N).
        - `label`: (b,) int64, the samples' own classes, where `target` was mixed by somebody else, timm's Mixup say.
            Scores and dictionary are about this class. In batches where another class is more of its target, a sample
            is no candidate for the dictionary, and has no pseudo-label. One-hot and smoothed targets need no
            `label`. Of mixed ones without it the largest entry is taken, no label is judged, and a warning says so.

        **Returns:** a scalar. In several processes it is scaled so that DDP's averaging gives the global loss.

        **Raises:** `ValueError` or `TypeError` for input of a wrong shape, dtype or range, or of another number of
        classes than before, or NaN or infinite, or if the processes were set up unlike each other; `RuntimeError` if no
        forward of the model preceded. Nothing has then changed. On an accelerator, where looking would wait for the
        device, values out of range are left out of the step at once and raised at the next call.
        """
        logits = as_logits(logits)
        if not torch.is_grad_enabled():
            return functional.cross_entropy(logits, target, self.config.label_smoothing).mean()
        if not self._alike:
            check_alike(self._facts(), logits.device)
            self._alike = True
        loss, size = self._reweighting.loss(logits, target, index, label)
        self._reminders.valued()
        self._count(size)
        return loss

    @_in_group
    def end_epoch(self) -> None:
        """Ends the epoch now: labels are judged, classes counted, and the best samples become the dictionary (Eq. 4).

        Does nothing if no sample came since the last.

        Needed only where the number of samples an epoch is not known, or an epoch shall end early.
        """
        if self._memory.ready and self._memory.consumed > 0:
            rates = (group.get("lr") for group in self.param_groups)  # None where the optimizer finds its own
            known = [float(rate) for rate in rates if isinstance(rate, (int, float, Tensor))]
            self._memory.end_epoch(max(known, default=0.0))

    @_in_group
    def mixup(self, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes a batch (MixUp as released: each sample with a partner, m = max(U²/2, 1 − U²/2)).

        Pass the mixed inputs to the model and the target to [`loss`][fsr_wrap.FSRWrapper.loss], both as they are
        returned. The clean inputs and labels are kept for scores, re-labelling and dictionary: `loss` runs the model
        on them once more, without gradients, which costs about a third of a plain step.

        **Arguments:** `inputs` (b, ...) floating point, the model's only tensor input or one of several;
        `target` (b,) int64 class numbers.

        **Returns:** the mixed inputs, and the target: (b, C) soft targets if the number of classes is known, that is
        from the second batch on or where the head is linear.

        **Raises:** `TypeError` or `ValueError` for inputs that cannot be mixed.
        """
        return self._reweighting.intake.mixup(self._memory, inputs, target)

    def _facts(self) -> dict[str, Any]:
        """What must be the same in all processes."""
        memory, per_epoch = self._memory, self._samples_per_epoch
        facts = {"num_samples": memory.num_samples, "samples_per_epoch": per_epoch, **asdict(self.config)}
        facts["pusher"] = self.config.pusher_name
        return facts | {"epoch": memory.epoch, "consumed": memory.consumed, "draws": memory.draws}

    def _count(self, size: int) -> None:
        """Ends the epoch when its samples are consumed; reminds of `end_epoch` where their number is not known."""
        memory, new = self._memory, self._reweighting.new
        if memory.epoch == 0 and size and new is not None:
            self._reminders.came(new, memory.consumed)
        memory.consumed += size
        if self._samples_per_epoch is not None:
            if memory.consumed >= self._samples_per_epoch:
                self._reminders.epoch_ends(memory, size)
                self.end_epoch()
        elif memory.epoch == 0 and memory.consumed >= 2 * (memory.largest + 1) and not self._warned:
            self._warned = True
            warn(
                "The samples seem to come again, but no epoch has ended, so there is no reward data and nothing is "
                "re-weighted: pass dataset= or num_samples= to FSRWrapper, or call end_epoch() after each epoch.",
            )

    # --- what FSR knows ----------------------------------------------------------------------------------------------

    @property
    def _memory(self) -> Memory:
        return self._reweighting.memory

    @property
    def head(self) -> str:
        """The dotted name of the head."""
        return self._reweighting.head.name

    @property
    def epoch(self) -> int:
        """Epochs ended so far."""
        return self._memory.epoch

    @property
    def is_reweighting(self) -> bool:
        """Whether the next `loss()` re-weights: labels are judged; or, by the paper's rules, the warm-up is over and
        there is reward data."""
        return self._memory.is_active

    @property
    def dictionary(self) -> RewardDictionary:
        """R. **Raises:** `RuntimeError` before the first `loss()`, when the number of classes is not known yet."""
        return self._known().dictionary

    @property
    def scores(self) -> Tensor:
        """P̂ of each sample, (N,) float32, NaN where a sample was not visited. A view: do not write to it."""
        return self._known().table.score[:-1]

    def _known(self) -> Memory:
        if not self._memory.ready:
            raise RuntimeError("FSR knows nothing yet: call loss() first, which also tells the number of classes.")
        return self._memory

    @property
    def weights(self) -> Tensor:
        """ω of the last batch in this process, (b,), detached; over all processes they sum to 1, or to 0; once labels
        are judged to what is left of their weight."""
        if self._reweighting.weights is None:
            raise RuntimeError("There are no weights before the first loss().")
        return self._reweighting.weights

    @_in_group
    def metrics(self) -> dict[str, float]:
        """What happened since the last call, for a tracker; synchronises with the device.

        In several processes each reports its own part of the batches.

        **Returns:** means over the steps since the last call: `fsr/loss` (the weighted loss), `fsr/reward_loss`
        (0 in warm-up and by default), `fsr/zero_weight_ratio` (the share of samples of weight 0, under `"select"` of
        the weight that is taken away), `fsr/effective_sample_size` ((Σω)²/Σω² of a batch),
        `fsr/max_weight` (the largest ω times b); sums: `fsr/all_zero_batches`, `fsr/skipped_samples`,
        `fsr/skipped_reward_samples` (NaN or infinite); and as they stand: `fsr/epoch`, `fsr/reweighting`,
        `fsr/dictionary_size`.
        Empty before the first `loss()`.
        """
        memory = self._memory
        if not memory.ready:
            return {}
        sums, steps = memory.counted().tolist(), max(memory.steps, 1)
        memory.sums.zero_()
        memory.steps = 0
        counts = ("all_zero_batches", "skipped_samples", "skipped_reward_samples")
        found = zip(METRICS, sums, strict=True)
        out = {f"fsr/{name}": value if name in counts else value / steps for name, value in found}
        out["fsr/epoch"] = memory.epoch
        out["fsr/reweighting"] = float(self.is_reweighting)
        out["fsr/dictionary_size"] = len(memory.dictionary)
        return out

    @property
    def history(self) -> list[dict[str, float | None]]:
        """How training went, an entry for each epoch that ended; kept in the state, the same in all processes.

        Of the epoch, over all processes: `epoch` (from 0), `samples`, `loss` (the weighted loss), `reward_loss` (0
        where there is no reward data), `zero_weight_ratio` (as `metrics` has it), `effective_share` (the effective
        sample size (Σω)²/Σω², as a share of the samples), `reweighting` (whether samples were re-weighted or
        labels taken for wrong). As it ended, and None where it is not known: under `weight_rule="select"`
        `agreement` and `held_out_agreement` (how often the network agreed with the labels that it trained on, and with
        those held out, which are trained on once labels are judged) and `wrong_share` (the estimated share of wrong
        labels); under the paper's rules `dictionary_agreement` (how many of the dictionary's samples are classified, on
        average, as they are labelled: a sign of its purity).
        """
        return [dict(entry) for entry in self._memory.history.epochs] if self._memory.ready else []

    def label_issues(
        self, share: float | None = None, *, class_names: Sequence[str] | Mapping[int, str] | None = None
    ) -> DataFrame:
        """Which labels look wrong, as a pandas DataFrame: a row for each sample, by its index.

        It costs no training and no pass over the data: it is read from what `loss` has left. It is the same in all
        processes, and what a state dict or `save` keeps is enough for it. Ask at the end of an epoch, best of the last.

        **Arguments:**

        - `share`: of all samples, those of the lowest quality are issues. If it is not given, about as many as there
            are wrong labels, by the run's own estimate, which there is from the third epoch on: before, there are none,
            and a warning says so.
        - `class_names`: of the C classes, by their numbers. If they are not given, those of the data set that the
            wrapper was given: of a Hugging Face `ClassLabel`, or torchvision's `classes`.

        **Returns:** the columns, the first four as in cleanlab:

        - `is_label_issue`: bool. `label_quality`: in [0, 1], the lower, the likelier is the label wrong.
        - `given_label` and `predicted_label`: class numbers, <NA> where there is none. Predictions are averaged over
            epochs; under the paper's rules with `relabel_weight=0` they are not kept. Where the given class is the
            likeliest but often given for the second one, the latter is the predicted label.
        - `given_name` and `predicted_name`, where the classes have names.
        - `score`: P̂, see [`scores`][fsr_wrap.FSRWrapper.scores]. `visits`: epochs in which the sample was seen.
        - `zero_weight`: under `"select"` the share of these in which the label was held out or taken for wrong; else
            NaN.

        A sample that was never seen is no issue, and has NaN or <NA>.

        **Raises:** `RuntimeError` before the first `loss()`, and in mid-epoch of several processes without
        [`consolidate`][fsr_wrap.FSRWrapper.consolidate]; `ValueError` for a share out of [0, 1] or another number of
        names; `ImportError` without pandas: `pip install "fsr_wrap[report]"`.
        """
        return issues.label_issues_from_memory(self._memory, share, class_names)

    def pred_probs(self) -> ndarray:
        """The averaged predictions, a NumPy array (N, C) float32 whose rows sum to 1, as cleanlab takes them.

        `cleanlab.filter.find_label_issues(labels, fsr.pred_probs())`. They are averages over epochs, of a network that
        was also trained on these samples. A sample that was never seen has 1/C everywhere.

        **Raises:** `RuntimeError` as in [`label_issues`][fsr_wrap.FSRWrapper.label_issues], and where predictions are
        not kept, under the paper's rules with `relabel_weight=0`.
        """
        return issues.pred_probs(self._memory)

    def cleaned(
        self, dataset: Any, *, drop: bool = False, relabel: bool = False, issues: DataFrame | None = None
    ) -> Any:
        """The data set without the samples whose labels look wrong, or with the predicted labels in their place.

        ```python
        clean = fsr.cleaned(train_set, drop=True)
        ```

        **Arguments:**

        - `dataset`: the one that was trained on, a torch map-style or a Hugging Face `Dataset`, with or without
            [`with_index`][fsr_wrap.with_index]. Where its samples have indices, it may also be a part of it, in any
            order.
        - `drop` or `relabel`: one of them must be True.
        - `issues`: what [`label_issues`][fsr_wrap.FSRWrapper.label_issues] gave, edited as you like: `is_label_issue`
            and `predicted_label` are looked at, by the table's index, or by its column `index`, as in the CSV file. If
            it is not given, `label_issues()`.

        **Returns:** a data set of the same kind (of torch, a `Subset`). Samples that have an index keep it: for a new
        wrapper that starts afresh, that is as good as new ones. Nothing is copied, and the data set stays as it was.

        **Raises:** `TypeError` for a stream or no data set; `ValueError` if it is another data set than was trained
        on, or in another order, as its labels tell (of a torch data set 128 samples are read for it), or if the table
        is of another run; `RuntimeError` as in `label_issues`, and for `relabel` where predictions are not kept.
        """
        return cleaning.clean(self._memory, dataset, drop=drop, relabel=relabel, table=issues, column=self._column)

    def report(
        self,
        folder: str | os.PathLike[str],
        dataset: Any = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        *,
        to_image: Callable[[Any], Any] | None = None,
    ) -> Path:
        """Writes which labels look wrong as a page to look at, `folder/index.html`, and as `folder/label_issues.csv`.

        The page needs no network and no other file. It shows how many labels look wrong, which classes are taken for
        which, the worst samples as pictures or texts, all flagged labels (the 50,000 worst, if there are more), and how
        training went. The CSV file has what [`label_issues`][fsr_wrap.FSRWrapper.label_issues] gives, those that look
        wrong first. In several processes call it in one of them, at the end of an epoch.

        ```python
        optimizer.report("report", dataset=train_set)
        ```

        **Arguments:**

        - `dataset`: the one that was trained on, torch map-style or a Hugging Face `Dataset`, or a part of it whose
            samples have their indices. Up to 240 samples are read from it, without its own transforms where that can
            be done. Without it the page has no pictures.
        - `class_names`: as in `label_issues`.
        - `to_image`: of a sample as the data set gives it, what is to be shown: an image of PIL, an array or a tensor
            of (H, W), (H, W, 3) or (3, H, W), or a text. Give it where no picture is found: of flat vectors, say.

        **Returns:** the page's path.

        **Raises:** `ImportError` without what it needs: `pip install "fsr_wrap[report]"`; `TypeError` for a stream or
        no data set; `ValueError` if it is another data set than was trained on, or `to_image` gives no image; otherwise
        as in `label_issues`. Nothing is then written.
        """
        from .report import write_report

        more = {"dataset": dataset, "class_names": class_names, "to_image": to_image}
        return write_report(folder, self._memory, column=self._column, **more)

    @_in_group
    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict, and FSR's own state under `"fsr"`: plain tensors, numbers and strings.

        It loads with `weights_only=True`, and a plain optimizer loads it too, leaving FSR's part aside. It is the same
        in all processes and fits any number of them; in mid-epoch all of them must call
        [`consolidate`][fsr_wrap.FSRWrapper.consolidate] first. For torch.distributed.checkpoint, which knows groups and
        parameters only, FSR's part is in the first group: `get_optimizer_state_dict(model, optimizer)` and what
        builds on it, such as `accelerator.save_state` under FSDP2, carry it, sharded or full.
        """
        by_dcp = carry.asked_by_dcp()
        if by_dcp and any(hasattr(p, "full_tensor") for group in self.param_groups for p in group["params"]):
            self.consolidate()  # a part of a sharded model's state is of no use: all processes are here
        if self._memory.scattered and not self._warned_of_state:
            self._warned_of_state = True
            warn(
                "This state dict was taken in mid-epoch, in one of several processes, and lacks what the others saw "
                "since the epoch began: call consolidate() in all processes before.",
            )
        state = {**self.optimizer.state_dict(), "fsr": self._memory.state_dict()}
        return carry.pack(state) if by_dcp else state

    @_in_group
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; the run goes on bit for bit. From a plain optimizer's state dict the inner
        optimizer loads, and FSR starts afresh.

        **Raises:** `ValueError` if FSR's part belongs to a newer format, another data set or another kind of reward
        data; the wrapper is then as it was.
        """
        self._take(*self._parsed(state_dict))

    def _parsed(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], Memory]:
        """The inner optimizer's part, and FSR's memory; changes nothing."""
        state_dict = carry.unpack(state_dict)
        state = state_dict.pop("fsr", None)
        fitting = self.config, self._memory.num_samples, self._memory.samples
        if state is None:
            if self._memory.ready or carry.asked_by_dcp():
                warn(
                    "This state dict has no state of FSR, so FSR starts afresh. If it comes of a run with FSR, load "
                    "what fsr.state_dict(), fsr.save(folder) or get_optimizer_state_dict(model, fsr) gave.",
                )
            return state_dict, Memory(*fitting)
        if "table" not in state and (state.get("epoch") or state.get("consumed")):
            raise ValueError(
                "FSR's state is not whole: dcp.load() fills in what a state dict has already, and that of "
                "a new FSRWrapper has no tables. Save and load get_optimizer_state_dict(model, fsr), or fsr itself: "
                'dcp.save({"fsr": fsr}).'
            )
        return state_dict, Memory.from_state_dict(state, *fitting)

    def _take(self, state_dict: dict[str, Any], memory: Memory) -> None:
        self._compare_names(memory.class_names)
        self.optimizer.load_state_dict(self._sharded(state_dict))
        memory.class_names = self._memory.class_names or memory.class_names
        self._reweighting.take_over(memory)
        self._alike = False

    def _compare_names(self, others: list[str] | None) -> None:
        """Warns where the classes of what is loaded have other names."""
        own = self._memory.class_names
        if own is not None and others is not None and own != others and distributed.rank() == 0:
            warn(
                f"What is loaded was trained on classes of other names, {first_difference(others, own)} first. Where "
                "the classes are in another order, its scores and predictions are of other classes: load it with the "
                "data set that it was trained on.",
            )

    def _sharded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The inner optimizer's state dict, with whole tensors sharded where FSDP2 shards their parameters."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        state = dict(state_dict["state"])
        for number, parameter in zip(numbers, params, strict=False):  # the optimizer says if there are too few
            if number in state:
                sharded = partial(distributed.shard_like, parameter=parameter)
                state[number] = pytree.tree_map_only(Tensor, sharded, state[number])
        return {**state_dict, "state": state}

    @_in_group
    def consolidate(self) -> None:
        """In several processes, brings together what each of them holds apart since the epoch began: candidates'
        features or inputs, and pseudo-labels. All processes must call it, before one of them takes a `state_dict` in
        mid-epoch. Training goes on as if nothing had happened. In one process there is nothing to do.

        With Accelerate: `accelerator.register_save_state_pre_hook(lambda *_: optimizer.consolidate())`.
        """
        self._memory.consolidate()

    @_in_group
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `state_dict()` to `folder/fsr.safetensors`, without pickle; a file of that name is always whole.

        All processes must call it; the first one writes, and all return when it is done.

        **Raises:** `OSError` if it cannot be written, in all processes, which can go on: nothing has then changed.
        """
        self.consolidate()
        state = pytree.tree_map_only(Tensor, distributed.whole, self.state_dict())
        distributed.together(lambda: write_state(folder, state) if distributed.rank() == 0 else None)

    @_in_group
    def load(self, folder: str | os.PathLike[str]) -> None:
        """Loads what `save` wrote to the folder. All processes must call it.

        **Raises:** `FileNotFoundError`; `ValueError` if the file is damaged, or as in `load_state_dict`; in all
        processes, also if one of them alone has no good file. The wrapper is then as it was.
        """
        self._take(*distributed.together(lambda: self._parsed(read_state(folder))))

    # --- the optimizer's face ----------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's own."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's own."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's own."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """The inner optimizer's step.

        With `closure`, the closure calls `loss()` as usual. Only its first evaluation values the batch; the others of
        the same step, LBFGS's say, take the same weights and pseudo-labels.
        """
        if closure is None:
            self._reminders.stepped(self._reweighting.intake.waiting)
            return self.optimizer.step(**kwargs)
        return self.optimizer.step(self._reweighting.evaluated_once(closure), **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's `zero_grad`."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The inner optimizer's `add_param_group`."""
        self.optimizer.add_param_group(param_group)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """The inner optimizer's; the hook is given the inner optimizer."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """The inner optimizer's; the hook is given the inner optimizer."""
        return self.optimizer.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The inner optimizer's."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The inner optimizer's."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The inner optimizer's."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The inner optimizer's."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    if not TYPE_CHECKING:  # a type checker would let every misspelt name pass

        def __getattr__(self, name: str) -> Any:
            if name == "optimizer":  # not there yet: while unpickling
                raise AttributeError(name)
            try:
                return getattr(self.optimizer, name)
            except AttributeError:
                raise AttributeError(self._unknown(name), name=name) from None

        # GradScaler hands these to fused optimizers by setting and deleting them.
        def __setattr__(self, name: str, value: Any) -> None:
            if name in ("grad_scale", "found_inf"):
                setattr(self.optimizer, name, value)
            else:
                object.__setattr__(self, name, value)

        def __delattr__(self, name: str) -> None:
            if name in ("grad_scale", "found_inf"):
                delattr(self.optimizer, name)
            else:
                object.__delattr__(self, name)

    def _unknown(self, name: str) -> str:
        message = f"FSRWrapper has no attribute {name!r}, nor has the {type(self.optimizer).__name__} in it"
        if name.startswith("_"):  # torch asks for some at every step, to see whether they are there
            return message + "."
        known = {other for other in (*dir(self), *dir(self.optimizer)) if not other.startswith("_")} - {name}
        close = difflib.get_close_matches(name, known, 1)
        return message + (f": did you mean {close[0]!r}?" if close else ".")

    # Lightning and Accelerate look up whose optimizer a scheduler has.
    def __eq__(self, other: object) -> bool:
        """Whether it is the same optimizer, wrapped or not."""
        return self is other or bool(self.optimizer == other)

    def __hash__(self) -> int:
        return hash(self.optimizer)

    def __getstate__(self) -> dict[str, Any]:
        patched = ("step", "_opt_called")  # a scheduler's marks on this very object
        return {name: value for name, value in self.__dict__.items() if name not in patched}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"FSRWrapper(head={self.head!r}, epoch={self.epoch}, config={self.config})\n{self.optimizer!r}"
