"""lm-evaluation-harness over an engine in this process: no server between task and logits.

    python -m latentrt.validation.harness --model latentrt --model_args bundle=BUNDLE --tasks hellaswag

It is `lm_eval` with a model more (pip install lm-eval, and what it wants beside). Through a server, its own `local-completions`
does it, too.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from latentrt.runtime.api import load
from latentrt.runtime.errors import RequestError
from latentrt.runtime.sampling_params import SamplingParams

ANSWER = 256  # tokens, where a task does not say: lm-eval's own


@register_model("latentrt")
class LatentRt(TemplateLM):
    """An engine as a model of lm-eval. Arguments are those of latentrt.load; numbers may come as texts."""

    backend = "causal"

    def __init__(
        self, bundle: str, target: str | None = None, cache_tokens: int | str | None = None, threads: int | str = 0,
        backend: str | None = None, device: str | None = None, max_gen_toks: int | str = ANSWER, **ignored,
    ):  # fmt: skip
        super().__init__()
        cache = int(cache_tokens) if cache_tokens else None
        self.engine = load(bundle, target, cache, int(threads), backend, device or "auto")
        self._longest, self._answer = self.engine.limits.max_context, int(max_gen_toks)
        self._tokenizer = self.engine.needed_tokenizer()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. RequestError for a bundle that names none."""
        if not self.engine.eos_ids:
            raise RequestError(f"{self.engine.bundle.path}: names no end-of-text token, which lm-eval needs")
        return self.engine.bundle.manifest.text.end_of_text[0].id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context begins with."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Under which answers are cached."""
        return str(self.engine.bundle.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids; with what belongs in front of a prompt unless `add_special_tokens` is False."""
        return self._tokenizer.encode(string, special=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        if add_generation_prompt:
            return self._tokenizer.render_chat(chat_history)
        return self._tokenizer.render_unfinished(chat_history)  # the answer goes on with the last message

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The name of the template, for the harness' records."""
        return "default" if chat_template else ""

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Sums of log probabilities of whole texts, in windows of the longest context."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False), prefix_token=self.prefix_token_id,
                max_seq_len=self._longest - 1, context_len=1,
            )  # fmt: skip
            pairs = [(("", text), *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers, all in one batch: the engine runs as many at once as fit."""
        asked = [request.args for request in requests]
        params = [self._params(dict(options)) for _, options in asked]
        prompts = []
        for (text, _), chosen in zip(asked, params, strict=True):
            ids = self.tok_encode(text)
            prompts.append(ids[-(self._longest - chosen.max_new_tokens) :])  # as lm-eval does: the end of the context counts
        return [result.text for result in self.engine.generate(prompts, params)]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """(log probability, whether greedy decoding would write it) of continuations, given contexts; both as token ids."""
        whole = [([*context, *continuation])[-self._longest :] for _, context, continuation in requests]
        rows = self._rows([tokens[:-1] for tokens in whole])
        return [self._judge(tokens, len(r[2]), logits) for tokens, r, logits in zip(whole, requests, rows, strict=True)]

    def _rows(self, lists: Sequence[list[int]]) -> Iterator[np.ndarray]:
        """Logits [tokens, vocab] of each list, in order; the engine's blocks hold several lists, or parts of one."""
        blocks, left = self.engine.logit_blocks(lists), np.zeros((0, self.engine.vocab_size), np.float32)
        for tokens in lists:
            while len(left) < len(tokens):
                left = np.concatenate([left, next(blocks)])
            yield left[: len(tokens)]
            left = left[len(tokens) :]

    def _judge(self, tokens: list[int], count: int, logits: np.ndarray) -> tuple[float, bool]:
        """Of the last `count` tokens, which the rows before them tell of."""
        wide, wanted = logits[len(logits) - count :].astype(np.float64), np.asarray(tokens[-count:])
        largest = wide.max(-1, keepdims=True)
        total = largest[:, 0] + np.log(np.exp(wide - largest).sum(-1))
        told = wide[np.arange(count), wanted] - total
        return float(told.sum()), bool((wide.argmax(-1) == wanted).all())

    def _params(self, options: dict) -> SamplingParams:
        """A task's generation_kwargs in our words."""
        until = options.pop("until", None) or []
        sampled = options.pop("do_sample", options.get("temperature", 0) > 0)
        given = {name: options[name] for name in ("temperature", "top_p", "top_k", "seed") if sampled and name in options}
        longest = min(int(options.pop("max_gen_toks", options.pop("max_new_tokens", self._answer))), self._longest - 1)
        return SamplingParams(stop=(until,) if isinstance(until, str) else tuple(until), max_new_tokens=longest, **given)


def main() -> None:
    """`lm_eval`, which knows the model above by now."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
