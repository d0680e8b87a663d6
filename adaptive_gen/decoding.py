"""The token loop: readouts -> logits processors -> tokens -> stopping criteria -> next readouts.

It does what transformers' own sampling loop does, in the same order and with the same draws from
the random generator, on readouts that come from whatever depth the scheduler left at. Rows of a
batch that leave together are processed together. In lossless decoding a token that left early is
only a draft until full depth confirms it.

Axes: `rows`, `time`, `vocab`.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.streamers import BaseStreamer

from .audit import Auditor, guarded
from .engine.backend import Backend
from .engine.choosing import Choice, choice_of
from .engine.drafts import DraftLength
from .engine.lasting import makes_lasting
from .engine.rules import Readout
from .engine.scheduler import Scheduler
from .report import AdaptiveOutput, Report, Step
from .resume import AdaptiveCache
from .settings import Settings
from .texts import Draft, Text, Texts, equally_wide

_MOST_ROOM = 4096  # new tokens to make room for at once, however many may come


class TokenLoop:
    """A batch of texts being generated: iterate over it for its `Step`s."""

    @makes_lasting
    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        config: Any,
        input_ids: Tensor,
        lengths: Sequence[int],
        logits_processor: Any,
        stopping_criteria: Any,
        streamer: BaseStreamer | None = None,
        past: AdaptiveCache | None = None,
    ):
        """Set up queues and cache; nothing runs until the first `next`.

        Args:
            backend: the model and what runs its layers.
            settings: exits, policy, confidence, KV policy.
            config: transformers' prepared generation config.
            input_ids: [rows, time] prompts as given, with any left padding.
            lengths: of each prompt without its padding.
            logits_processor: transformers' list, called with [rows, time] ids and [rows, vocab]
                float32.
            stopping_criteria: transformers' list.
            streamer: gets every new token.
            past: what an earlier generation left, for one row.
        """
        self.config, self.settings = config, settings
        self.streamer, self._lengths = streamer, list(lengths)
        room = max(1, min((config.max_length or 0) - input_ids.shape[1], _MOST_ROOM))
        self.texts = Texts(input_ids, room, config, logits_processor, stopping_criteria)
        policy = settings.policy
        guard = None if settings.audit_floor is None else guarded(policy, settings.audit_floor)
        self._backend, self._warm_up_s = backend, backend.warm_up_s
        segments, readout = backend.segments(settings.exit_layers), backend.readout()
        if past is not None:
            cache = past.take(backend.decoder, input_ids[0, -lengths[0] :])
        else:
            cache = backend.cache(max(lengths) + room, len(lengths))
        self.scheduler = Scheduler(
            backend.decoder,
            segments,
            cache,
            guard or policy,
            backend.confidences(settings.confidences),
            settings.rules,
            readout,
            backend.embed(),
            backend.normed(),
        )
        self.engine = backend.name
        self._auditor = Auditor(guard) if settings.audit else None
        self._open = list(self.texts.rows)  # those still growing, in the scheduler's order
        if settings.lossless:
            self._limit_drafts()
        self._stretch, choice = None, self._choice()
        if choice is not None:
            self._stretch = backend.stretch(self.scheduler, choice, settings.audit)
        self._midway = False  # whether queues and cache are being changed, or were when it ended
        self.prefill_s = self.decode_s = 0.0

    @property
    def finished(self) -> bool:
        """Whether every text has ended."""
        return not self._open

    def __iter__(self) -> Iterator[Step]:
        """Decode until a stopping criterion holds for every row."""
        shown = 0
        try:
            self._prefill()
            while self._open:
                for step in self._next():
                    shown += 1
                    if self.streamer is not None:
                        self.streamer.put(torch.tensor([step.token]))
                    yield step
        finally:  # also where whoever looks on has seen enough
            one = len(self.texts.rows) == 1
            self.texts.draws.end(shown if one else max(len(text.steps) for text in self.texts.rows))
        if self.streamer is not None:
            self.streamer.end()

    @torch.no_grad()
    def _next(self) -> list[Step]:
        """Decode until there are new tokens, or a row goes on to its next segment."""
        clock, self._midway = time.perf_counter(), True
        first = any(not text.steps for text in self.texts.rows)
        if self._stretch is not None and not first:
            steps = self._run_stretch()
        else:
            readout = self.scheduler.step()
            steps = [] if readout is None else self._settle(readout)
        seconds = time.perf_counter() - clock
        if first:
            self.prefill_s += seconds
        else:
            self.decode_s += seconds
        self._midway = False
        return steps

    @torch.no_grad()
    def _prefill(self) -> None:
        clock = time.perf_counter()
        width, held = self.texts.prompts.shape[1], self.scheduler.cache.lengths[0]
        counts = [length - h for length, h in zip(self._lengths, held, strict=True)]
        prompts = self.texts.prompts.new_zeros(len(counts), max(counts))
        for row, count in enumerate(counts):
            prompts[row, :count] = self.texts.prompts[row, width - count :]
        self.scheduler.prefill(prompts, counts)
        self.prefill_s += time.perf_counter() - clock

    def _limit_drafts(self) -> None:
        """Let every row draft as much as is worth it, as far as that is known."""
        shallow = self.settings.exit_layers[0] / self.settings.exit_layers[-1]
        for text, row in zip(self._open, self.scheduler.rows, strict=True):
            text.draft_length = DraftLength(shallow, self.settings.rules.queue_cap)
            row.draft_length, row.cap = text.draft_length, text.draft_length.length

    def _choice(self) -> Choice | None:
        """How tokens are chosen, if they are kept and ended by nothing but their ids."""
        config, texts = self.config, self.texts
        if config.output_scores or config.output_logits or texts.ends is None:
            return None
        draws = texts.draws if config.do_sample else None
        return choice_of(draws, texts.logits_processor, texts.so_far)

    def _run_stretch(self) -> list[Step]:
        """Decode the next tokens of all open texts at once."""
        assert self._stretch is not None and self.texts.ends is not None
        texts, (length, ends) = self._open, self.texts.ends
        newest = [int(self.texts.ids[text.row, text.width - 1]) for text in texts]
        room = [int(min(length - text.width, _MOST_ROOM)) for text in texts]
        found = self._stretch.run(newest, room, ends, [text.row for text in texts])
        new: list[Step] = []
        for text, steps in zip(texts, found, strict=True):
            if not steps:
                continue
            self.texts.extend(text, [step.token for step in steps])
            # Only the last of them may have ended the text.
            ended = text.width >= length or steps[-1].token in ends
            steps[-1] = steps[-1]._replace(last=ended)
            text.steps += steps
            text.finished = steps[-1].last
            new += steps
        if self._auditor is not None:
            self._auditor.add(self._stretch.compared())
        self._feed(texts)
        return new

    def _settle(self, readout: Readout) -> list[Step]:
        """Turn rows that left into text and feed what comes next; return the tokens now certain."""
        texts = [self._open[row] for row in readout.rows]
        done = [len(text.steps) for text in texts]
        places = list(range(len(texts)))
        if readout.drafts is not None:
            judged = zip(texts, readout.drafts, strict=True)
            stood = [self._judge(text, logits) for text, logits in judged]
            # A row whose draft fell has its next token already: the one in the draft's place.
            places = [place for place in places if stood[place]]
        for group in equally_wide(texts, places):
            self._choose([texts[place] for place in group], readout, group)
        self._judge_ends([text for text in texts if text.drafts and text.drafts[-1].step.last])
        self._feed(texts)
        return [step for text, n in zip(texts, done, strict=True) for step in text.steps[n:]]

    def _choose(self, texts: list[Text], readout: Readout, places: list[int]) -> None:
        """Pick the next token of equally long texts from the readout's logits at `places`."""
        every = len(places) == len(readout.rows)
        logits = readout.logits if every else readout.logits[places]
        scores, logits = self.texts.process(texts, logits)
        tokens = self.texts.choose(texts, scores)
        self.texts.append(texts, tokens)
        ids = tokens.tolist()
        stops = self.texts.stop(texts, ids, scores)
        early = readout.exit_layer < self.scheduler.decoder.n_layers
        for i, (text, token) in enumerate(zip(texts, ids, strict=True)):
            step = Step(token, readout.exit_layer, readout.confidences[places[i]], stops[i])
            if early and (self.settings.lossless or self._auditor is not None):
                top = int(scores[i].argmax()) if self.config.do_sample else token
                text.drafts.append(Draft(step, top))
            if early and self.settings.lossless:
                continue
            if self._auditor is not None and not early:
                self._auditor.count(readout.exit_layer, True)
            self._confirm(text, step, scores[i : i + 1], logits[i : i + 1])

    def _judge_ends(self, texts: list[Text]) -> None:
        """Confirm texts that end with a draft: nothing would come after it to take it deeper."""
        if not texts or not self.settings.lossless:
            return
        read = self.scheduler.flush(tuple(text.place for text in texts))
        assert read is not None
        for text, logits in zip(texts, read, strict=True):
            self._judge(text, logits)

    def _judge(self, text: Text, logits: Tensor) -> bool:
        """Compare a text's drafts with full depth's logits [drafts, vocab].

        Returns:
            False if a draft did not stand and the text now ends with the token in its place, or if
            a draft that stood ended the text.
        """
        drafts, text.drafts = text.drafts, []
        assert len(drafts) == len(logits), "every draft has its full-depth readout"
        end = text.width
        for i, draft in enumerate(drafts):
            # Processors see the text as it was when the draft was made.
            text.width = end - len(drafts) + i
            scores, raw = self.texts.process([text], logits[i : i + 1])
            if not self.settings.lossless:
                assert self._auditor is not None
                self._auditor.count(draft.step.exit_layer, int(scores.argmax()) == draft.top)
                continue
            token = int(self.texts.choose([text], scores))
            stands = token == draft.step.token
            text.width += 1
            if stands:
                step = draft.step
                if self.config.output_scores:  # criteria may read them, and saw the exit's
                    step = step._replace(last=self.texts.stop([text], [step.token], scores)[0])
                self._confirm(text, step, scores, raw)
            else:
                self.texts.ids[text.row, text.width - 1] = token
                (stops,) = self.texts.stop([text], [token], scores)
                n_layers = self.scheduler.decoder.n_layers
                self._confirm(text, Step(token, n_layers, math.nan, stops), scores, raw)
            if not stands or text.finished:
                # The text's last token has not been run: what stays in the cache ends before it.
                length = self._lengths[text.row] + len(text.steps) - 1
                self.scheduler.rewind(text.place, length)
                self._relearn(text, i + stands, i + 1)
                return False
        text.width = end
        if self.settings.lossless and drafts:
            self._relearn(text, len(drafts), len(drafts))
        return True

    def _relearn(self, text: Text, stood: int, judged: int) -> None:
        assert text.draft_length is not None
        text.draft_length.observe(stood, judged)
        self.scheduler.rows[text.place].cap = text.draft_length.length

    def _confirm(self, text: Text, step: Step, scores: Tensor, logits: Tensor) -> None:
        text.steps.append(step)
        text.finished = step.last
        if self.config.output_scores:
            text.scores.append(scores)
        if self.config.output_logits:
            text.logits.append(logits)

    def _feed(self, texts: list[Text]) -> None:
        """Let finished texts go and give the others' last tokens to the scheduler."""
        if any(text.finished for text in texts):
            staying = [row for row, text in enumerate(self._open) if not text.finished]
            if staying:
                self.scheduler.keep(staying)
            self._open = [self._open[row] for row in staying]
            for place, text in enumerate(self._open):
                text.place = place
        growing = [text for text in texts if not text.finished]
        if growing and self._stretch is None:
            rows = tuple(text.place for text in growing)
            self.scheduler.feed(rows, self.texts.newest(growing))

    def report(self) -> Report:
        """The account of what has been decoded so far."""
        depths = [step.exit_layer for text in self.texts.rows for step in text.steps]
        n_layers = self.scheduler.decoder.n_layers
        mean_depth = sum(depths) / len(depths) if depths else float(n_layers)
        draft_lengths = [text.draft_length for text in self.texts.rows if text.draft_length]
        return Report(
            new_tokens=len(depths),
            n_layers=n_layers,
            mean_depth=mean_depth,
            layer_speedup=n_layers / mean_depth,
            exit_histogram=dict(sorted(Counter(depths).items())),
            deep_passes=self.scheduler.deep_passes,
            caught_up=self.scheduler.caught_up,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            drafted=sum(length.drafted for length in draft_lengths),
            accepted=sum(length.accepted for length in draft_lengths),
            audit=self._auditor.result(len(depths)) if self._auditor else None,
            engine=self.engine,
            rows=len(self.texts.rows),
            layers_run=self.scheduler.layers_run,
            certificate=self.settings.certificate,
            unchecked=self.settings.unchecked or self.scheduler.thrift.account(),
            warm_up_s=self._backend.warm_up_s - self._warm_up_s,
        )

    def cache(self) -> AdaptiveCache | None:
        """What the next generation can start from, if this was one text, and left between tokens.

        Ctrl-C comes up at any place, most likely just behind a kernel.
        """
        if len(self.texts.rows) > 1 or not self.texts.rows[0].steps or self._midway:
            return None
        text = self.texts.rows[0]
        start, stop = self.texts.prompts.shape[1], self.texts.prompts.shape[1] + len(text.steps)
        return AdaptiveCache(
            self.scheduler, self.texts.ids[0, start - self._lengths[0] : stop].clone()
        )

    def output(self) -> AdaptiveOutput:
        """The result in transformers' form."""
        steps = [text.steps for text in self.texts.rows]
        exits = [torch.tensor([step.exit_layer for step in row]) for row in steps]
        confidences = [torch.tensor([step.confidence for step in row]) for row in steps]
        return AdaptiveOutput(
            sequences=self.texts.sequences(),  # type: ignore[arg-type]
            scores=self.texts.by_step("scores") if self.config.output_scores else None,  # type: ignore[arg-type]
            logits=self.texts.by_step("logits") if self.config.output_logits else None,  # type: ignore[arg-type]
            past_key_values=self.cache(),  # type: ignore[arg-type]
            exit_layers=pad_sequence(exits, batch_first=True),
            confidences=pad_sequence(confidences, batch_first=True, padding_value=math.nan),
            report=self.report(),
        )
