"""Judges a recorded run against the reference, on any machine: no engine is needed, only the checkpoint.

The emulation of the engine's roundings goes through the whole model freely, as the engine did, and what both are off by is
compared: next-token distributions, layers by their sketches, routing. Where only sums round, a token that a near tie sends to
other experts stands out; so there a window counts up to the first token whose gate margin rounding could bridge.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from latentrt.export.checkpoint import Checkpoint, combined_digest
from latentrt.export.errors import ConfigError
from latentrt.export.models import registry
from latentrt.runtime.bundle.reader import RECORDED, Bundle
from latentrt.validation import recording as recordings
from latentrt.validation.bisect.spread import DOUBT, MISTAKES
from latentrt.validation.calibration.expected import Expected, expect
from latentrt.validation.compare import counted
from latentrt.validation.errors import ValidationError
from latentrt.validation.judge import routing
from latentrt.validation.judge.findings import Findings, plain
from latentrt.validation.judge.paired import Paired
from latentrt.validation.judge.statistics import paired_test
from latentrt.validation.judge.tolerances import FLIPS, Tolerance
from latentrt.validation.pairs import check_pair
from latentrt.validation.recording import LAYER_VALUES, Recording, sketch
from latentrt.validation.reference import formulas
from latentrt.validation.reference.model import Reference, Routing, Trace
from latentrt.validation.report import evidence as evidences
from latentrt.validation.sources.base import Rows
from latentrt.validation.sources.difference import divergence
from latentrt.validation.stages import numerics

STAGES = 4
LAYERS = "layers, running freely: median error of a token, by sketches"
LAYER_REASON = f"{DOUBT:g} times what the target's own roundings, emulated, make of the same tokens; a median minds no flips"
BRIDGED = 2 * DOUBT  # times the emulated change of a router logit: what may bridge a gate margin
ROUTED_REASON = "exact paired test: flips at most twice as often as in the emulation fail once in a million"


class Judge:
    """One recorded run. Raises ValidationError where it is not this checkpoint's; `run` returns the findings."""

    def __init__(self, recording: Recording, checkpoint: Checkpoint, progress: Callable[[str], None] = lambda stage: None):
        self.r, self.checkpoint, self.progress = recording, checkpoint, progress
        self.roundings = numerics.restore(recording.facts["roundings"])
        self.findings = Findings(tolerances=_name(recording.facts), executed=recording.facts["executed"])
        self.windows = recording.tokens.windows
        self.emulated: dict[tuple[int, str], np.ndarray] = {}  # (layer, tensor) -> sketch
        self.emulated_ids: dict[int, np.ndarray] = {}
        self.emulated_logits: dict[int, np.ndarray] = {}  # of the router, all windows; where only sums round

    def run(self) -> Findings:
        """Raises ReferenceRefused or CheckpointError."""
        f, tokens = self.findings, self.r.tokens
        f.text = {"source": tokens.source, "tokens": sum(map(len, self.windows)), "windows": len(self.windows),
                  "window": len(self.windows[0]), "is_text": tokens.is_text}  # fmt: skip
        f.notes = [f"recorded {self.r.facts['date']} on {self.r.facts['machine']}", *self.r.facts["notes"]]
        self.progress("audit and load the reference")
        self.reference = Reference(self.checkpoint)
        f.audit = [vars(c) for c in self.reference.audit]
        self.progress("emulate the engine's roundings")
        expected = expect(self.checkpoint, self.roundings, self.windows, visit=self._visit)
        self.progress("layers and routing")
        used = [self._used(k) for k in range(len(self.windows))]
        if self.r.traced:
            self._layers(min(used[0], self.r.traced))
        self.progress("next-token distributions")
        self._modes(expected, used)
        return f

    def _used(self, k: int) -> int:
        """How many first tokens of a window count."""
        window, start = self.windows[k], sum(map(len, self.windows[:k]))
        if not self.emulated_logits:
            return len(window)
        near = np.zeros(len(window), bool)
        for layer, expected in self.reference.trace(window).routing.items():
            mine = self.emulated_logits[layer][start : start + len(window)]
            _, margin = formulas.margins(expected.router_logits, self.checkpoint.config)
            near |= margin <= 2 * BRIDGED * np.abs(mine - expected.router_logits).max(-1)
        return int(near.argmax()) if near.any() else len(window)

    def _visit(self, layer: int, values: dict) -> None:
        rows = slice(0, self.r.traced)
        if self.r.traced:
            self.emulated |= {(layer, name): sketch(values[name][rows].numpy(), layer) for name in LAYER_VALUES}
        if "topk_ids" in values:
            self.emulated_ids[layer] = values["topk_ids"][rows].numpy()
            if self.roundings.is_exact:
                self.emulated_logits[layer] = values["router_logits"].float().numpy()

    def _layers(self, used: int) -> None:
        """used: tokens of window 0 that count."""
        trace, rows = self.reference.trace(self.windows[0][: self.r.traced]), slice(0, used)
        self._routing(trace)
        if not used:
            return
        worst, off = (-1.0, 0.0, 0.0), ""
        for layer, sketches in enumerate(self.r.layers):
            for name in LAYER_VALUES:
                exact = sketch(getattr(trace, name)[layer], layer)[rows]
                found, expected = (_error(exact, s[rows]) for s in (sketches[name], self.emulated[layer, name]))
                ratio = found / (DOUBT * expected) if expected else (0.0 if found == 0 else np.inf)
                worst = max(worst, (ratio, found, expected))
                off = off or (f"layer {layer} is the first that is off: its {name}" if not ratio <= 1 else "")
        tolerance = Tolerance(DOUBT * worst[2], LAYER_REASON, expected=worst[2])
        self.findings.judge(LAYERS, "engine", worst[1], tolerance, off)

    def _routing(self, trace: Trace) -> None:
        compared, found, emulated = [], [], []
        for layer, (ids, logits) in self.r.routing.items():
            expected = trace.routing[layer]
            mine = routing.compare(layer, expected, Routing(None, logits, ids, None), None, self.checkpoint.config)
            compared.append(mine)
            found.append(mine.flipped)
            emulated.append((np.sort(self.emulated_ids[layer], -1) != np.sort(expected.ids, -1)).any(-1))
        if not compared:
            return
        flips = [flip for c in compared for flip in c.flips]
        wrong = [flip for flip in flips if not flip.explained]
        detail = f"layer {wrong[0].layer} is the first with such a flip: its router is wrong" if wrong else ""
        self.findings.judge("routing flips without a near tie", "engine", len(wrong), FLIPS, detail)
        chance = paired_test(np.concatenate(found), np.concatenate(emulated), DOUBT)
        detail = f"{len(flips)} flips, {np.concatenate(emulated).sum()} in the emulation"
        limit = Tolerance(MISTAKES, ROUTED_REASON, ">=")
        self.findings.judge("routing: chance of so many flips", "engine", chance, limit, detail)

    def _modes(self, expected: Expected, used: list[int]) -> None:
        pairs = {mode: Paired() for mode in ("prefill", "chunked", "decode")}
        for k, window in enumerate(self.windows):
            reference, emulated = (Rows.of_logits(window, x) for x in (self.reference.logits(window), expected.logits(k)))
            for mode, pair in pairs.items():
                if k < len(self.r.modes[mode]):
                    part = counted(mode, len(window), used[k], self.r.facts["decode_steps"])
                    _add(pair, reference, self.r.modes[mode][k], emulated, part)
        worst = max(pairs.values(), key=Paired.kl_ratio)
        worst.judge_kl(self.findings, "mean KL to the original over the likeliest tokens, worst mode", "engine")
        for mode, pair in pairs.items():
            pair.judge_top1(self.findings, f"top-1 of the original, {mode}", "engine")
        pairs["prefill"].judge_losses(self.findings, "perplexity: |ratio to the original - 1|", "engine")


def _add(pair: Paired, reference: Rows, found: Rows, emulated: Rows, used: slice) -> None:
    """Both sides over the tokens that were recorded."""
    narrow = Rows(np.take_along_axis(emulated.logprobs, found.ids, -1), emulated.following, found.ids)
    for side, rows, best in ((pair.found, found, found.best), (pair.emulated, narrow, emulated.best)):
        kl = divergence(reference, rows).kl
        side.add(kl, best == reference.best, reference.following - rows.following, used)


def _error(exact: np.ndarray, found: np.ndarray) -> float:
    """Median over tokens of relative errors; infinite where a sketch is not finite."""
    errors = np.linalg.norm(found.astype(np.float64) - exact, axis=-1) / (np.linalg.norm(exact, axis=-1) + 1e-30)
    return float(np.median(np.nan_to_num(errors, nan=np.inf)))


def _name(facts: dict) -> str:
    bundle = facts["bundle"]
    return f"{bundle['precision']}, {bundle['cache_format']} cache, recorded"


def judge(
    subject: Path, reference: Path | None, file: Path, progress: Callable[[str], None] = lambda stage: None
) -> tuple[dict, Findings, Bundle | None]:
    """subject: the bundle that was recorded, or a checkpoint. Returns the evidence, the findings, and the bundle.

    Raises ValidationError for a recording of another bundle or checkpoint, by digests.
    """
    recording = recordings.read(file)
    bundle = Bundle(subject) if (subject / "manifest.json").is_file() else None
    if bundle:
        _check_bundle(bundle, recording)
    checkpoint = Checkpoint(reference or (Path(bundle.manifest.checkpoint.path) if bundle else subject))
    digest = _check_checkpoint(checkpoint, bundle, recording)
    findings = Judge(recording, checkpoint, progress).run()
    first = findings.first_failure
    told = {"verdict": "pass" if findings.passed else "fail", "first_failure": evidences.describe(first) if first else None}
    facts = {name: recording.facts[name] for name in ("bundle", "evidence_name")}
    recorded = {name: recording.facts[name] for name in ("date", "machine", "versions")} | {"file": str(file)}
    judged = {"date": evidences.now(), "machine": evidences.machine(), "versions": evidences.versions({"packages": {}})}
    told |= facts | judged | {"recorded": recorded, "checkpoint": {"path": str(checkpoint.path), "sha256": digest}}
    return plain(told | {k: v for k, v in vars(findings).items() if k != "series"}), findings, bundle


def write(evidence: dict, bundle: Bundle | None, folder: Path | None) -> list[Path]:
    """Into the bundle, if there is one, and into `folder`; returns the files."""
    files = []
    if bundle:
        files.append(evidences.write_evidence(bundle, evidence["evidence_name"] + RECORDED, evidence))
    if folder:
        files.append(evidences.write_json(folder, "recorded.json", evidence))
    return files


def _check_bundle(bundle: Bundle, recording: Recording) -> None:
    facts = recording.facts["bundle"]
    if facts["manifest_sha256"] != bundle.digest:
        raise ValidationError(
            f"{recording.path}: stale: it was recorded of manifest {facts['manifest_sha256'][:16]}…, target {facts['target']}; "
            f"{bundle.path} has {bundle.digest[:16]}… now; record it again"
        )


def _check_checkpoint(checkpoint: Checkpoint, bundle: Bundle | None, recording: Recording) -> str:
    facts = recording.facts
    try:
        check_pair(registry.find(facts["family"]).restore(facts["config"]), facts["checkpoint"]["path"], checkpoint)
    except ConfigError as error:
        raise ValidationError(f"{recording.path}: its model: {error}") from None
    known = {k: v.model_dump() for k, v in bundle.manifest.checkpoint.files.items()} if bundle else {}
    digest = combined_digest(checkpoint.file_digests(known))
    if digest != facts["checkpoint"]["sha256"]:
        raise ValidationError(
            f"{recording.path}: is a recording of another checkpoint (sha256 {facts['checkpoint']['sha256'][:16]}…) than "
            f"{checkpoint.path} ({digest[:16]}…); give {facts['checkpoint']['path']}, or record this one's engine"
        )
    return digest
