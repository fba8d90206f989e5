"""Models packed for cells that need a bundle."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from dipper.checksums import code_sha256
from dipper.errors import ConfigError
from dipper.files import safe_name
from dipper.kinds.kind import Context, stamp

if TYPE_CHECKING:
    from dipper.layout import BaseBits

__all__ = ["bundle_of", "packing_code"]


def packing_code() -> str:
    """Names the code that packs: bundles of other code are not used again."""
    return code_sha256(["packer"])[:12]


def bundle_of(
    context: Context,
    bits: int | None = None,
    base_bits: BaseBits | None = None,
    unit_bytes: int | None = None,
) -> Path:
    """The model packed into `workdir`, once.

    Args:
        context: whose model: a bundle is taken as it is.
        bits: of the MLP where the source has 16 or 32 bits; a quantised source keeps its own grid.
        base_bits, unit_bytes: as for `bundle.pack`.

    Raises:
        ConfigError: base_bits for a bundle that is packed already.
    """
    from dipper.bundle import UNIT_BYTES, pack
    from dipper.checkpoint import open_checkpoint
    from dipper.files import locked
    from dipper.glu import read_model
    from dipper.sources import pull

    source = Path(context.model) if Path(context.model).exists() else pull(context.model)
    if (source / "bundle.json").is_file():
        if base_bits:
            raise ConfigError(f"{source} is a bundle, which cannot be split again: give the model that it is from")
        return source
    parts = read_model(open_checkpoint(source)).parts.values()
    is_float = all(part.grid.is_float for part in parts if len(part.shape) == 2)
    packed_bits = str(bits or 4) if is_float else "source"
    split = "" if not base_bits else f"-base{base_bits}-unit{unit_bytes or UNIT_BYTES}"
    told = f"{stamp(str(source))} {packed_bits}{split} {packing_code()}"
    context.workdir.mkdir(parents=True, exist_ok=True)
    out = context.workdir / f"{safe_name(context.name)}-{sha256(told.encode()).hexdigest()[:12]}.dipper"
    with locked(out.with_suffix(".lock")):
        if not out.exists():
            pack(source, out, packed_bits, base_bits=base_bits or 0, unit_bytes=unit_bytes or UNIT_BYTES)
    return out
