"""Puts a pruning rule into a Hugging Face model: the only file that patches Hugging Face modules.

    with sparsify_(model, MethodConfig("dip", density=0.6)) as sparse:
        logits = model(input_ids).logits
        sparse.touched                     # 0.6: share of the MLPs' weight bits that a token touched

Layers are found by what they have, not by what they are called: a gate, an up and a down projection (or gate and up
fused), of linear layers or stacked over experts, and an activation. The modules stay where they are and keep their
parameters; only their `forward` is replaced, on the instance. So `generate`, KV caches, batches and bf16 work as
before, and `undo` leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dipper.calibration import Calibration
from dipper.errors import ConfigError
from dipper.methods import METHODS, CachedMethod, Dip, Glu, Method, MethodConfig, PrunedLinear
from dipper.split_weights import Splits

__all__ = ["Adapter", "Sparsified", "find_glus", "sparsify_"]

# (gate, up, down) as projections are called, and gate and up as one.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = ("gate_up_proj", "down_proj")
_LINEARS: tuple[tuple[str, ...], ...] = (*_NAMES, _FUSED)
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


@dataclass
class _Site:
    """A module whose forward is replaced, with the weights of its GLU, or of its experts."""

    name: str
    module: nn.Module
    glus: list[Glu]
    is_experts: bool

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The linear layers of a GLU by their names in the module: gate, up, down, or gate and up in one, down."""
        return {name: getattr(self.module, name) for name in next(n for n in _LINEARS if _has_linears(self.module, n))}


class Adapter(Protocol):
    """What changes the weights of the MLPs' linear layers; `dipper.adapter` has LoRA's."""

    def weight(self, linear: nn.Module) -> Tensor:
        """The weights [out, in] that `linear` should have now, with their gradient."""


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    part = getattr(module, name, None)
    part = getattr(part, "base_layer", part)  # under an adapter of peft's
    return part if isinstance(part, nn.Linear) else None


def _has_linears(module: nn.Module, names: Sequence[str]) -> bool:
    return all(_linear(module, name) is not None for name in names)


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    return next((getattr(module, name) for name in _ACTIVATIONS if hasattr(module, name)), None)


def _split_glu(module: nn.Module, act: Callable[[Tensor], Tensor]) -> Glu | None:
    for names in _NAMES:
        gate, up, down = (_linear(module, name) for name in names)
        if gate is not None and up is not None and down is not None:
            return Glu(gate.weight, up.weight, down.weight, act, gate.bias, up.bias, down.bias)
    gate_up, down = (_linear(module, name) for name in _FUSED)
    if gate_up is None or down is None:
        return None
    gate_bias, up_bias = (None, None) if gate_up.bias is None else gate_up.bias.chunk(2)
    gate, up = gate_up.weight.chunk(2)
    return Glu(gate, up, down.weight, act, gate_bias, up_bias, down.bias)


def _expert_glus(module: nn.Module, act: Callable[[Tensor], Tensor]) -> list[Glu]:
    """Experts stacked in parameters [E, 2 I, D] and [E, D, I]."""
    gate_up, down = (getattr(module, name, None) for name in _FUSED)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.ndim != 3:
        return []
    halves = (fused.chunk(2) for fused in gate_up)
    return [Glu(gate, up, single, act) for (gate, up), single in zip(halves, down, strict=True)]


def find_glus(model: nn.Module) -> list[_Site]:
    """GLU MLPs of a model, in the order of its modules.

    Raises:
        ConfigError: there is none; the message says what was looked for.
    """
    sites = []
    for name, module in model.named_modules():
        act = _activation(module)
        if act is None:
            continue
        glu = _split_glu(module, act)
        if glu is not None:
            sites.append(_Site(name, module, [glu], False))
        elif experts := _expert_glus(module, act):
            sites.append(_Site(name, module, experts, True))
    if not sites:
        raise ConfigError(
            f"{type(model).__name__} has no GLU MLP: looked for modules with an activation "
            f"({', '.join(_ACTIVATIONS)}) and {' or '.join('/'.join(names) for names in (*_NAMES, _FUSED))}, as linear "
            "layers or stacked experts"
        )
    return sites


def _run_experts(rules: Sequence[Callable[[Tensor], Tensor]], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """x [N, D] through the experts of each token: index, weights [N, experts per token]."""
    y = torch.zeros_like(x)
    for expert in index.unique().tolist():
        if expert >= len(rules):  # a router's mark for tokens that are nobody's
            continue
        token, place = torch.where(index == expert)
        y.index_add_(0, token, (rules[expert](x[token]) * weights[token, place, None]).to(y.dtype))
    return y


class Sparsified:
    """A model with its rules in place; a context manager that takes them out again.

    Attributes:
        config: what was asked for.
        rules: every `Method`, in the order of the layers (and experts).
    """

    def __init__(
        self,
        model: nn.Module,
        config: MethodConfig,
        sites: list[_Site],
        rules: list[list[Method]],
        linears: list[tuple[nn.Module, PrunedLinear]],
        adapter: Adapter | None = None,
    ) -> None:
        self.model, self.config, self._adapter = model, config, adapter
        self.rules = [rule for site_rules in rules for rule in site_rules]
        self.linears = [linear for _, linear in linears]
        self._linear_modules = [module for module, _ in linears]
        self._sites, self._site_rules = sites, rules
        self._patched: list[nn.Module] = []
        self._is_paused = False
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    # -- patching

    def _patch(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = forward
        self._patched.append(module)

    def _use(self, call_of: Callable[[Method | PrunedLinear], Callable[[Tensor], Tensor]]) -> None:
        """Makes every site compute what `call_of` gives for its rules."""
        self._restore()
        for module, linear in zip(self._linear_modules, self.linears, strict=True):
            self._patch(module, call_of(linear))
        for site, rules in zip(self._sites, self._site_rules, strict=True):
            calls = [self._adapted(site, rule, call_of(rule)) for rule in rules]
            self._patch(site.module, partial(_run_experts, calls) if site.is_experts else calls[0])

    def _adapted(self, site: _Site, rule: Method, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`call` after the rule has taken the weights that the adapter gives now: masks and products see W + BA."""
        if self._adapter is None:
            return call
        adapter = self._adapter

        def adapted(x: Tensor) -> Tensor:
            rule.take_weights(*_adapted_weights(site, adapter))
            return call(x)

        return adapted

    def _restore(self) -> None:
        for module in self._patched:
            del module.forward  # the instance's own; the class's is back
        self._patched.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The dense model without adapter, for as long as the context lasts; nothing is counted, no cache moves."""
        self._restore()
        if self._adapter is not None:
            for site in self._sites:
                self._patch(site.module, site.glus[0].dense)
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self._use(lambda part: part)

    @contextmanager
    def beside_dense(self, compare: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """The dense model runs, and each layer's rule beside it on the same inputs: layers see no others' losses.

        Args:
            compare: called with the rule's output, which has a gradient, and the dense one, layer after layer.
        """

        def beside(site: _Site, rule: Method) -> Callable[[Tensor], Tensor]:
            call = self._adapted(site, rule, rule)

            def both(x: Tensor) -> Tensor:
                with torch.no_grad():
                    dense = site.glus[0].dense(x)
                with torch.enable_grad():
                    compare(call(x.detach()), dense)
                return dense

            return both

        self._restore()
        for site, rules in zip(self._sites, self._site_rules, strict=True):
            self._patch(site.module, beside(site, rules[0]))
        try:
            yield
        finally:
            self._use(lambda part: part)

    def set_density(self, density: float) -> None:
        """Another density from now on, the same in every layer."""
        for rule in self.rules:
            rule.set_density(density)

    def undo(self) -> None:
        """Leaves the model as it was; calling it twice is no error."""
        self._restore()
        self._hook.remove()

    def __enter__(self) -> Sparsified:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    # -- sequences

    def reset(self) -> None:
        """New sequences: column caches are empty again. A forward pass without past tokens does it by itself."""
        for rule in self.rules:
            rule.reset()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_paused:
            return
        past = kwargs.get("past_key_values")
        if past is None:
            past = kwargs.get("cache")  # its name in newer transformers
        n_past = 0 if past is None else past.get_seq_length()
        if n_past == 0:
            self.reset()
        if self.config.capacity is None:
            return
        mask = kwargs.get("attention_mask")
        used = None if mask is None or mask.ndim != 2 else mask[:, n_past:].bool()
        for rule in self.rules:
            if isinstance(rule, CachedMethod):
                rule.used = used

    # -- figures

    def reset_meters(self) -> None:
        """Counters start anew."""
        for rule in self.rules:
            rule.meter.reset()
        for linear in self.linears:
            linear.meter.reset()

    @property
    def touched(self) -> float:
        """Share of the MLPs' weight bits that a token touched, the mean over layers by their weights."""
        used = [rule for rule in self.rules if rule.meter.n_tokens]
        weights = [rule.glu.gate.numel() for rule in used]
        return float(sum(rule.meter.touched * n for rule, n in zip(used, weights, strict=True)) / max(1, sum(weights)))

    @property
    def hit_rate(self) -> float | None:
        """Of the simulated column caches, in columns; None without."""
        selected = sum(rule.meter.selected for rule in self.rules)
        return sum(rule.meter.hits for rule in self.rules) / selected if selected else None

    @property
    def flash_share(self) -> float | None:
        """Share of the MLPs' weight bits that a token reads from flash; None where no cache is simulated."""
        shares = [rule.meter.flash_share for rule in self.rules]
        known = [share for share in shares if share is not None]
        return sum(known) / len(known) if known else None

    @property
    def extra_dram_bits(self) -> float:
        """Bits that the rules hold beyond the model's weights."""
        return sum(rule.extra_dram_bits for rule in self.rules)


def _adapted_weights(site: _Site, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and down as the adapter has them now."""
    *first, down = (adapter.weight(linear) for linear in site.linears.values())
    gate, up = first if len(first) == 2 else first[0].chunk(2)
    return gate, up, down


def _rules_of(
    config: MethodConfig,
    sites: Iterable[_Site],
    densities: Sequence[tuple[float, ...]] | None,
    adapter: Adapter | None,
    splits: Splits | None,
) -> Iterator[list[Method]]:
    layer = 0
    for site in sites:
        rules = []
        for glu in site.glus:
            own = config if densities is None else replace(config, densities=densities[layer])
            if adapter is not None:
                glu = replace(glu)  # the rule's own: the site's stays dense
                if not METHODS[config.name].follows_weights:  # the others take weights as they run
                    with torch.no_grad():
                        glu.gate, glu.up, glu.down = _adapted_weights(site, adapter)
            if splits is not None and not site.is_experts:
                glu = replace(glu, split=splits.of_layer(layer, glu.gate, glu.up, glu.down))
            rules.append(METHODS[config.name](own, glu, layer))
            layer += 1
        yield rules


def _take_fit(rules: Sequence[Method], fitted: Calibration, config: MethodConfig) -> None:
    """Puts a calibration's densities, norms and means into DIP's rules."""
    if len(rules) != fitted.model["n_layers"]:
        raise ConfigError(
            f"the calibration is for {fitted.model['name']} with {fitted.model['n_layers']} layers, and this model has "
            f"{len(rules)}: calibrate this model"
        )
    table = fitted.densities(config.density) if fitted.tables else None
    for layer, rule in enumerate(rules):
        if not isinstance(rule, Dip):
            raise ConfigError(f"a calibration holds what dip and dip-ca need, and the method is {config.name}")
        if table is not None:
            rule.set_densities(*table[layer].tolist())
        rule.take_fit(
            None if fitted.factors is None else fitted.factors[layer],
            None if fitted.means is None else fitted.means[layer],
        )


def _attention_linears(model: nn.Module, config: MethodConfig) -> Iterator[tuple[nn.Module, PrunedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _ATTENTION:
            yield module, PrunedLinear(config, module.weight, module.bias)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _calibrate(sparse: Sparsified, windows: Iterable[Tensor]) -> None:
    """Shows every rule the dense model's activations on `windows`."""

    def collecting(part: Method | PrunedLinear) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            part.collect(x)
            return part.dense(x)

        return call

    sparse._use(collecting)
    seen = False
    for window in windows:
        ids = window if window.ndim == 2 else window[None]
        sparse.model(input_ids=ids.to(next(sparse.model.parameters()).device), use_cache=False)
        seen = True
    if not seen:
        raise ConfigError(f"{sparse.config.name} needs calibration text, and none was given")
    parts: list[Method | PrunedLinear] = [*sparse.rules, *sparse.linears]
    for part in parts:
        part.fit()


def sparsify_(
    model: nn.Module,
    config: MethodConfig,
    *,
    calibration: Iterable[Tensor] | None = None,
    densities: Sequence[tuple[float, ...]] | None = None,
    fitted: Calibration | None = None,
    adapter: Adapter | None = None,
    splits: Splits | None = None,
) -> Sparsified:
    """Makes the GLU MLPs of a model use fewer weights, in place.

    Args:
        model: a Hugging Face causal language model (any whose GLU layers `find_glus` finds), in eval mode.
        config: the rule.
        calibration: token windows, each [T] or [B, T], for rules that look at text first (thresholds, mean
            compensation, predictors, Wanda, SparseGPT). Dense activations are shown.
        densities: the rule's own densities by layer, in place of equal ones (`MethodConfig.densities`).
        fitted: what `calibrate` found for `config.density`: densities by layer, norms and means, as the engine takes
            them; `dip` and `dip-ca` alone, and their `norms` and `compensate` are then the file's.
        adapter: changes the weights of the MLPs; rules see the changed ones, `paused` the model's own.
        splits: `planes`: the model's matrices as base and residual; None: its weights quantised to 4 bits.

    Returns:
        The handle: meters, `reset`, `undo`; a context manager.

    Raises:
        ConfigError: no GLU layers, a rule that cannot do what is asked, or calibration is missing.
    """
    sites = find_glus(model)
    n_layers = sum(len(site.glus) for site in sites)
    if densities is not None and len(densities) != n_layers:
        raise ConfigError(f"densities for {len(densities)} layers were given, and the model has {n_layers} GLU layers")
    if config.whole and max(config.whole) >= n_layers:
        raise ConfigError(
            f"layer {max(config.whole)} is to be whole, and the model has none: give layers of 0..{n_layers - 1}"
        )
    linears = [] if config.linears == "mlp" else list(_attention_linears(model, config))
    if adapter is not None and any(site.is_experts for site in sites):
        raise ConfigError("the experts of this model are stacked in one parameter, which no adapter is for")
    rules = list(_rules_of(config, sites, densities, adapter, splits))
    sparse = Sparsified(model, config, sites, rules, linears, adapter)
    try:
        if fitted is not None:
            _take_fit(sparse.rules, fitted, config)
        elif METHODS[config.name].needs_data(config):
            if calibration is None:
                raise ConfigError(f"{config.name} needs calibration text, and none was given")
            _calibrate(sparse, calibration)
        sparse._use(lambda part: part)
        sparse.reset_meters()
    except BaseException:
        sparse.undo()
        raise
    return sparse
