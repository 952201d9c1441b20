"""The adapters of a model: put on, chosen for each token, merged, taken off.

    adapters = lora.attach(model, LoraConfig(r=8, targets=("attention", "experts")))   # to train one
    lora.merge(model)                                                # plain weights again

    adapters = lora.of(model)                                        # to serve several
    lora.load(model, "adapters/french", "french")
    with adapters.using(["french", None, "french"]):                 # one name a token
        model(...)

The model's own parameters keep their names and objects throughout.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from herdling.errors import ConfigError, InputError
from herdling.lora.config import LoraConfig
from herdling.lora.layers import Factors, LoraExperts, LoraLinear, adapted
from herdling.model.sites import Site, home_of, select, shape_of, weight_of

Active = list[tuple[str, Tensor | None]]
"""Keys of the adapters in use, with the tokens that use each (None: all)."""


class Adapters:
    """All adapters of one model, and which of them each token of the present call uses."""

    def __init__(self, model: nn.Module) -> None:
        """Use `of(model)`, which gives the one that the model has."""
        self.model = model
        self.default: str | None = None
        """Name of the adapter for tokens that ask for none: the one in training; None in serving."""
        self.changes = 0
        """How often layers took or lost adapters: whoever keeps what layers are looks here."""
        self._keys: dict[str, str] = {}
        self._sites: dict[str, dict[str, tuple[Site, Factors]]] = {}
        self._next = 0
        self._chosen: Active | None = None
        self._named = 0
        self._frozen: list[nn.Parameter] = []

    @property
    def names(self) -> list[str]:
        return list(self._keys)

    @property
    def active(self) -> Active:
        if self._chosen is not None:
            return self._chosen
        return [] if self.default is None else [(self._keys[self.default], None)]

    def key(self, name: str | None) -> str | None:
        """Stands for the adapter that tokens of this name use, and never for another; None for none."""
        name = self.default if name is None else name
        return None if name is None else self._keys.get(name)

    def factors(self, name: str | None = None) -> dict[str, tuple[Site, Factors]]:
        """The matrices that an adapter reaches and its factors for each, by the matrix's name.

        `name` may be left out where there is one adapter. Raises ConfigError for an unknown one.
        """
        if name is None and len(self._keys) == 1:
            name = self.names[0]
        if name is None or name not in self._keys:
            what = "the model has several" if name is None else f"no adapter {name!r}"
            raise ConfigError(f"{what}; there are: {', '.join(self.names) or 'none'}")
        return self._sites[name]

    def has(self, kind: str) -> bool:
        """Whether any adapter reaches matrices of this kind."""
        return any(s.kind == kind for found in self._sites.values() for s, _ in found.values())

    def add(self, name: str, factors: Mapping[Site, Factors]) -> None:
        """Put a further adapter on; nobody uses it yet."""
        if name in self._keys:
            raise ConfigError(f"adapter {name!r} is there already; remove it first")
        if not factors:
            raise ConfigError(f"adapter {name!r} reaches no matrix")
        key, self._next = str(self._next), self._next + 1
        self.changes += 1
        for site, own in factors.items():
            module = self._adapted(site)
            if site.fused is None:
                module.lora[key] = own
            else:
                if key not in module.lora:
                    module.lora[key] = nn.ModuleDict()
                pair = module.lora[key]
                assert isinstance(pair, nn.ModuleDict)
                pair[site.fused] = own
        self._keys[name] = key
        self._sites[name] = {site.path: (site, own) for site, own in factors.items()}

    def remove(self, name: str) -> None:
        """Take an adapter off; a layer that none reaches any more is a plain one again.

        Not within a step of an engine; requests that use it end there with an error.
        """
        found = self.factors(name)
        key = self._keys.pop(name)
        self.changes += 1
        del self._sites[name]
        for path in dict.fromkeys(site.module for site, _ in found.values()):
            module = self.model.get_submodule(path)
            assert isinstance(module, LoraLinear | LoraExperts)
            del module.lora[key]
            if not module.lora:
                del module.lora, module.choice
                vars(module).pop("pictures", None)
                module.__class__ = module.over  # pyright: ignore[reportAttributeAccessIssue]
        if self.default == name:
            self.default = None
        if not self._keys:
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            self._frozen = []

    def train(self, name: str, factors: Mapping[Site, Factors]) -> None:
        """Put a further adapter on that every token uses, and freeze the model until the last is gone.

        Raises ConfigError where one is in training already.
        """
        self.check_idle()
        others = [p for p in self.model.parameters() if p.requires_grad]
        self.add(name, factors)
        for parameter in others:
            parameter.requires_grad_(False)
        self._frozen += others
        self.default = name

    def check_idle(self) -> None:
        """Raise ConfigError where an adapter is in training."""
        if self.default is not None:
            raise ConfigError(f"adapter {self.default!r} is in training; merge or remove it first")

    @contextmanager
    def using(
        self, names: Sequence[str | None], lengths: Sequence[int] | None = None
    ) -> Iterator[None]:
        """In here each token of a call uses the adapter named for it, None the default.

        Args:
            names: one for each token, in the order in which they lie in the input (rows end to end);
                if all are equal, for any number of tokens.
            lengths: with it, names are of runs of so many tokens each.

        Raises InputError for a name that is not loaded; a call of another number of tokens does as well.
        """
        before = self._chosen, self._named
        self._chosen = self._groups(names, lengths)
        self._named = len(names) if lengths is None else sum(lengths)
        try:
            yield
        finally:
            self._chosen, self._named = before

    def _groups(self, names: Sequence[str | None], lengths: Sequence[int] | None) -> Active:
        names = [self.default if name is None else name for name in names]
        for name in names:
            self.check(name)
        distinct = dict.fromkeys(names)
        if len(distinct) <= 1:
            return [(self._keys[name], None) for name in distinct if name is not None]
        rows: dict[str, list[Tensor]] = {self._keys[n]: [] for n in distinct if n is not None}
        start = 0
        for name, length in zip(names, lengths or [1] * len(names), strict=True):
            if name is not None:
                rows[self._keys[name]].append(torch.arange(start, start + length))
            start += length
        device = next(self.model.parameters()).device
        return [(key, torch.cat(parts).to(device)) for key, parts in rows.items()]

    def check_tokens(self, count: int) -> None:
        """Raise InputError unless adapters are named for so many tokens; for where names differ."""
        if count != self._named:
            raise InputError(
                f"adapters are named for {self._named} tokens, and the call has {count}"
            )

    def check(self, name: str | None) -> None:
        """Raise InputError for the name of an adapter that is not there."""
        if name is not None and name not in self._keys:
            there = ", ".join(self.names) or "none"
            raise InputError(f"adapter {name!r} is not loaded; there are: {there}")

    def _adapted(self, site: Site) -> LoraLinear | LoraExperts:
        """The module of a site, made one that takes adapters."""
        module = self.model.get_submodule(site.module)
        if not isinstance(module, LoraLinear | LoraExperts):
            kind = adapted(type(module), site.kind == "head")
            if kind is None:
                raise ConfigError(
                    f"{site.module} is a {type(module).__name__}, which takes no lora"
                )
            module.__class__ = kind
            module.lora = nn.ModuleDict()
            module.choice = self  # pyright: ignore[reportArgumentType]
            vars(module)["pictures"] = site.kind in ("vision", "projector")
        assert isinstance(module, LoraLinear | LoraExperts)
        return module


def of(model: nn.Module) -> Adapters:
    """The adapters of a model, in one object for as long as the model lives."""
    return vars(model).setdefault("adapters", Adapters(model))


def attach(model: nn.Module, config: LoraConfig, name: str = "adapter", seed: int = 0) -> Adapters:
    """Freeze the model and put a new adapter on it that every token uses and that can be trained.

    It changes nothing yet: A is uniform in +-1/sqrt(in), a function of seed and name, B is 0.
    Raises ConfigError for targets that match nothing, a rank beyond every matrix, or DoRA on experts
    or router.
    """
    adapters = of(model)
    adapters.check_idle()
    found = select(model, config.targets)
    if config.dora and (wrong := [s for s in found if s.kind in ("experts", "router")]):
        raise ConfigError(
            f"lora dora=true does not work on {wrong[0].kind}, which targets name; "
            "leave them out, or dora"
        )
    longest = max(max(shape_of(model, site)[-2:]) for site in found)
    if config.r > longest:
        raise ConfigError(
            f"lora r is {config.r}; no matrix that it reaches has more than {longest} rows or columns"
        )
    adapters.train(name, {site: new_factors(model, site, config, seed) for site in found})
    return adapters


def new_factors(model: nn.Module, site: Site, config: LoraConfig, seed: int) -> Factors:
    """Factors of no effect yet, in the weight's type (float32 where it is no float: 4 bits, say)."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{site.path}".encode()))
    module, shape = model.get_submodule(site.module), shape_of(model, site)
    device, kind = home_of(model, site)
    if site.fused:
        E, inner, out = shape
        shape_a, shape_b = (E, inner, config.r), (E, config.r, out)
    else:
        out, inner = shape
        shape_a, shape_b = (config.r, inner), (out, config.r)
    A = (2 * torch.rand(shape_a, generator=generator) - 1) * inner**-0.5
    magnitude = None
    if config.dora:
        assert isinstance(module, nn.Linear)
        magnitude = torch.linalg.vector_norm(module.weight.detach().float(), dim=1).to(kind)
    return Factors(
        A.to(device, kind),
        torch.zeros(shape_b, device=device, dtype=kind),
        config.alpha,
        config.rslora,
        magnitude,
    )


@torch.no_grad()
def merge(
    model: nn.Module, name: str | None = None, plain: Callable[[nn.Module], None] | None = None
) -> None:
    """Add an adapter to the weights, in place, and take it and all others off.

    `name` may be left out where there is one adapter. `plain` makes the weights float ones once the
    adapters are off, where they are not. The sum is made in float32.
    """
    adapters = of(model)
    found = list(adapters.factors(name).values())
    detach(model)
    if plain is not None:
        plain(model)
    for site, factors in found:
        weight = weight_of(model, site)
        weight.copy_(factors.changed(weight))


def detach(model: nn.Module) -> None:
    """Take all adapters off; the model is what it was, trainable again."""
    adapters = of(model)
    for name in adapters.names:
        adapters.remove(name)
