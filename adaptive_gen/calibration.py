"""The calibration artefact: what `calibrate` writes and `generate` reads.

`calibration.json` lives in the model directory. It holds, per confidence measure and exit layer, a
map from the raw confidence to the chance that full depth would choose the same token, and the
operating points that were predicted and measured with them. The schema is this file's dataclasses;
`version` changes when an old reader would misunderstand a new file.
"""

import dataclasses
import hashlib
import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import certificate as certificates
from .certificate import Certificate
from .errors import CalibrationError, Unreachable
from .files import whole

FILE_NAME = "calibration.json"
VERSION = 2
READABLE = (1, 2)  # version 1 had neither certificates, qualities nor thresholds per exit


@dataclasses.dataclass(frozen=True)
class ConfidenceMap:
    """Raw confidence -> chance of agreement, as a non-decreasing piecewise linear curve."""

    raw: tuple[float, ...]  # ascending knots in [0, 1]
    chance: tuple[float, ...]  # non-decreasing, in [0, 1], one per knot

    def __post_init__(self):
        if not self.raw or len(self.raw) != len(self.chance):
            raise CalibrationError(
                f"a confidence map has {len(self.raw)} raw and {len(self.chance)} chance knots; "
                "it needs as many of one as of the other. Run `calibrate run` again."
            )
        for name, knots in (("raw", self.raw), ("chance", self.chance)):
            if any(not 0 <= k <= 1 for k in knots) or list(knots) != sorted(knots):
                raise CalibrationError(
                    f"the {name} knots of a confidence map must ascend within [0, 1]. "
                    "Run `calibrate run` again."
                )

    def __call__(self, confidence: float) -> float:
        """Chance of agreement for one raw confidence; flat beyond the outer knots."""
        i = bisect_right(self.raw, confidence)
        if i == 0:
            return self.chance[0]
        if i == len(self.raw):
            return self.chance[-1]
        left, right = self.raw[i - 1], self.raw[i]
        share = (confidence - left) / (right - left)
        return self.chance[i - 1] + share * (self.chance[i] - self.chance[i - 1])

    def raw_of(self, chance: float) -> float:
        """The smallest raw confidence that means at least `chance`, to the last bit.

        -inf where every one does, inf where none does.
        """
        i = bisect_left(self.chance, chance)
        if i == 0:
            return -math.inf
        if i == len(self.chance):
            return math.inf
        below, found = self.raw[i - 1], self.raw[i]
        while below < (middle := (below + found) / 2) < found:
            if self(middle) < chance:
                below = middle
            else:
                found = middle
        return found


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """One setting of the dial, with what it gains and what it costs."""

    # Smallest calibrated chance of agreement that exits; of all checked exits, or of each.
    threshold: float | Mapping[int, float]
    exit_layers: tuple[int, ...]  # exits that are checked, full depth last
    mean_depth: float  # layers per token
    layer_speedup: float  # n_layers / mean_depth
    agreement: float  # share of tokens full depth would choose too, on the same prefix
    predicted_speedup: float | None = None  # from the traces and the timed segments
    wall_speedup: float | None = None  # measured tokens/s over full depth; None = only predicted
    wall_speedup_interval: tuple[float, float] | None = None  # 95 % bootstrap over prompts
    tokens: int = 0  # tokens behind mean_depth and agreement
    latency_ms: float | None = None  # measured, per new token of whole calls
    decode_speedup: float | None = None  # wall_speedup with the prompts' passes left out
    # Loss of whole texts against full depth's -> (mean, low, high), 95 % bootstrap over prompts.
    quality: Mapping[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    certificate: Certificate | None = None

    @property
    def speedup(self) -> float:
        """The measured wall-clock gain where there is one, else the predicted one."""
        for value in (self.wall_speedup, self.predicted_speedup):
            if value is not None:
                return value
        return self.layer_speedup


# Thresholds, ascending -> exits below full depth that are worth a check there; maybe none.
Placement = tuple[tuple[float, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """All that generation needs to know about one model on one kind of device."""

    n_layers: int
    confidence: str  # the measure the operating points use
    kv: str  # "recompute" | "propagate"
    maps: Mapping[str, Mapping[int, ConfidenceMap]]  # measure -> exit layer -> map
    points: tuple[OperatingPoint, ...]  # ascending speed-up
    default: int  # index of the point `generate(adaptive=True)` uses
    fingerprint: Mapping[str, Any]  # what it was made on: model hash, dtype, device, engine
    recipe: Mapping[str, Any]  # how: target, prompts hash, seed, versions
    # Texts generated together -> wall_speedup of the default point over full depth, both with them.
    batches: Mapping[int, float] = dataclasses.field(default_factory=dict)
    # By predicted time, for calls that name a threshold and no exits.
    placement: Placement = ()

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Every exit layer that has a map, full depth last."""
        return tuple(sorted({*self.maps[self.confidence], self.n_layers}))

    @property
    def point(self) -> OperatingPoint:
        """The operating point used when the caller names none."""
        return self.points[self.default]

    @property
    def certified(self) -> bool:
        """Whether any operating point carries a promise."""
        return any(p.certificate is not None for p in self.points)

    def unpaid(self, rows: int) -> str:
        """Why exits are better left unchecked for `rows` texts at once; empty where they pay.

        The next larger batch that was measured speaks for those in between: the more rows, the
        likelier one of them goes to the end anyway.
        """
        measured = sorted(n for n in self.batches if n > 1)
        if rows == 1 or not measured:
            return ""
        like = next((n for n in measured if n >= rows), measured[-1])
        gain = self.batches[like]
        if gain >= 1:
            return ""
        at = "" if like == rows else f" at {like}"
        return f"exits are not checked at {rows} rows: measured {gain:.2f}x{at}"

    def placed(self, threshold: float) -> tuple[int, ...] | None:
        """The exits below full depth worth checking at a threshold; None where nobody looked."""
        if not self.placement or not self.placement[0][0] <= threshold < 1:
            return None
        return min(self.placement, key=lambda entry: abs(entry[0] - threshold))[1]

    def without_certificates(self) -> "Calibration":
        """The same settings with every promise withdrawn."""
        bare = tuple(dataclasses.replace(p, certificate=None) for p in self.points)
        return dataclasses.replace(self, points=bare)

    def for_speedup(self, target: float) -> OperatingPoint:
        """The most faithful operating point that is at least `target` times as fast.

        Raises:
            Unreachable: no point is that fast; the message names the fastest.
        """
        fast_enough = [p for p in self.points if p.speedup >= target]
        if not fast_enough:
            best = max(self.points, key=lambda p: p.speedup)
            raise Unreachable(
                f"no calibrated operating point reaches {target:g}x; the fastest is "
                f"{best.speedup:.2f}x at {best.agreement:.1%} agreement. Ask for that or less, or "
                "run `calibrate run --target-speedup` again on this device."
            )
        return max(fast_enough, key=lambda p: (p.agreement, p.speedup))


def save(
    calibration: Calibration, directory: str | os.PathLike[str], option: str = "--out"
) -> Path:
    """Write `calibration.json` into the model `directory`, whole or not at all.

    Args:
        calibration: what to write.
        directory: where.
        option: the command-line option that names another place, for the error.

    Raises:
        OutputError: the directory cannot be written.
    """
    path = Path(directory) / FILE_NAME
    document = {"version": VERSION, **dataclasses.asdict(calibration)}
    with whole(path, option) as file:
        json.dump(document, file, indent=1)
        file.write("\n")
    return path


def load(path: str | os.PathLike[str]) -> Calibration:
    """Read an artefact from a file or from the model directory that holds it.

    Raises:
        CalibrationError: missing, not JSON, another version, or a field that is missing or wrong.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise CalibrationError(
            f"there is no {path}. Give a calibration.json, or the model directory that holds one; "
            "`calibrate run MODEL` makes it."
        ) from None
    except OSError as error:
        raise CalibrationError(
            f"cannot read {path}: {error.strerror}. Give a calibration.json that you may read, or "
            "the model directory that holds one."
        ) from None
    except ValueError:
        raise CalibrationError(
            f"{path} is not JSON. Run `calibrate run` to make it anew."
        ) from None
    if not isinstance(document, dict) or document.get("version") not in READABLE:
        found = document.get("version") if isinstance(document, dict) else None
        raise CalibrationError(
            f"{path} has version {found!r}; this release reads version {READABLE[0]} to {VERSION}. "
            "Run `calibrate run` to make it anew."
        )
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationError(
            f"{path} is not a valid calibration ({type(error).__name__}: {error}). "
            "Run `calibrate run` to make it anew."
        ) from None


def _parse(document: dict[str, Any]) -> Calibration:
    maps = {
        measure: {
            int(layer): ConfidenceMap(tuple(m["raw"]), tuple(m["chance"]))
            for layer, m in by_layer.items()
        }
        for measure, by_layer in document["maps"].items()
    }
    points = tuple(_parse_point(p) for p in document["points"])
    if not 0 <= document["default"] < len(points):
        raise ValueError(f"default point {document['default']} of {len(points)}")
    if document["confidence"] not in maps:
        raise ValueError(f"no map for the measure {document['confidence']!r}")
    return Calibration(
        n_layers=int(document["n_layers"]),
        confidence=document["confidence"],
        kv=document["kv"],
        maps=maps,
        points=points,
        default=int(document["default"]),
        fingerprint=dict(document["fingerprint"]),
        recipe=dict(document["recipe"]),
        batches={int(n): float(gain) for n, gain in document.get("batches", {}).items()},
        placement=parse_placement(document.get("placement", [])),
    )


def parse_placement(document: Sequence[Any]) -> Placement:
    """From JSON."""
    return tuple((float(t), tuple(int(layer) for layer in exits)) for t, exits in document)


def _parse_point(point: dict[str, Any]) -> OperatingPoint:
    interval, threshold = point["wall_speedup_interval"], point["threshold"]
    if isinstance(threshold, dict):
        threshold = {int(layer): float(value) for layer, value in threshold.items()}
    return OperatingPoint(
        **{
            **point,
            "threshold": threshold,
            "exit_layers": tuple(int(layer) for layer in point["exit_layers"]),
            "wall_speedup_interval": None if interval is None else tuple(interval),
            "quality": {name: tuple(v) for name, v in point.get("quality", {}).items()},
            "certificate": certificates.parse(point.get("certificate")),
        }
    )


def fingerprint(model: Any, engine: str = "module", tokenizer: Any = None) -> dict[str, Any]:
    """What a calibration depends on: weights, tokenizer, dtype, device, engine and decoding.

    The weights' hash covers every 997th value of each tensor, in float32: it tells checkpoints
    apart and is the same whether a checkpoint stored in 16 bits is run in 16 or in 32.

    Args:
        model: the model.
        engine: the back end that runs its layers.
        tokenizer: None leaves it out.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.flatten()[::997].to("cpu", torch.float32).numpy().tobytes())
    device = model.device.type
    return {
        "model": digest.hexdigest()[:16],
        **({} if tokenizer is None else {"tokenizer": tokenizer_hash(tokenizer)}),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if device == "cuda" else device,
        "engine": engine,
        "batch": 1,
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """Names a tokenizer by its vocabulary, its chat template and how it cuts a sample up."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index}:{token}\n".encode("utf-8", "surrogatepass"))
    sample = "The 3 foxes don't say: naïve  `x += 1`,\n日本語 и ещё.\t"
    digest.update(json.dumps([tokenizer.chat_template, tokenizer(sample)["input_ids"]]).encode())
    return digest.hexdigest()[:16]


def differences(made: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Names of what differs between two fingerprints; what one of them leaves out does not."""
    return [key for key, value in here.items() if made.get(key) not in (None, value)]
