"""From a request's fields to SamplingParams: the bundle's own defaults, as vLLM does, for what is not given."""

from latentrt.runtime.api import Engine
from latentrt.runtime.errors import RequestError
from latentrt.runtime.sampling_params import SamplingParams
from latentrt.runtime.server.protocol import SamplingBody
from latentrt.runtime.structured import Constraint

DEFAULT_TEMPERATURE = 1.0  # OpenAI's, where neither request nor bundle says
_MOST_STOPS = 64
_FIELDS = {  # of SamplingParams, and those of the request
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "stop": "stop",
    "repetition_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "min_new_tokens": "min_tokens",
}  # fmt: skip


def sampling_params(
    engine: Engine, body: SamplingBody, max_new_tokens: int, choice: int = 0, logprobs: int | None = None,
    prompt_logprobs: int | None = None, constraint: Constraint | None = None,
) -> SamplingParams:  # fmt: skip
    """The params of one choice of a request. Raises RequestError for what is not accepted."""
    fields = {"temperature": DEFAULT_TEMPERATURE} | engine.bundle.manifest.text.sampling
    fields |= {ours: value for ours, theirs in _FIELDS.items() if (value := getattr(body, theirs)) is not None}
    fields["top_k"] = max(fields.get("top_k", 0), 0)  # vLLM: -1 is off
    if not isinstance(fields.get("stop", ""), str) and len(fields["stop"]) > _MOST_STOPS:
        raise RequestError(f"stop has {len(fields['stop'])} strings, accepted: up to {_MOST_STOPS}")
    fields["stop"] = [s for s in ([body.stop] if isinstance(body.stop, str) else body.stop or []) if s]
    fields["max_new_tokens"] = max(max_new_tokens, 1)
    fields["min_new_tokens"] = min(fields.get("min_new_tokens", 0), fields["max_new_tokens"])
    if body.seed is not None:
        fields["seed"] = (body.seed + choice) % 2**63
    return SamplingParams(
        **fields, ignore_eos=bool(body.ignore_eos), stop_token_ids=tuple(body.stop_token_ids or ()),
        skip_special_tokens=body.skip_special_tokens is not False, logit_bias=_biases(body.logit_bias or {}),
        logprobs=logprobs, prompt_logprobs=prompt_logprobs,
        constraint=constraint or asked_constraint(body),
    )  # fmt: skip


def asked_constraint(body: SamplingBody) -> Constraint | None:
    """What response_format, structured_outputs, or one of vLLM's older fields asks for; RequestError if more than one."""
    asked = [*_of_response_format(body), *_of_structured_outputs(body)]
    guided = {"json_schema": body.guided_json, "regex": body.guided_regex, "grammar": body.guided_grammar,
              "choice": body.guided_choice and tuple(body.guided_choice)}  # fmt: skip
    asked += [Constraint(kind, value) for kind, value in guided.items() if value is not None]
    if len(asked) > 1:
        raise RequestError(f"{len(asked)} constraints on the answer (response_format, structured_outputs, guided_*); give one")
    return asked[0] if asked else None


def _of_response_format(body: SamplingBody) -> list[Constraint]:
    form = body.response_format
    if form is None or form.type == "text":
        return []
    if form.type == "json_object":
        return [Constraint("json_object", None)]
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise RequestError("response_format is json_schema without a schema; give json_schema: {name, schema}")
    return [Constraint("json_schema", form.json_schema.schema_)]


def _of_structured_outputs(body: SamplingBody) -> list[Constraint]:
    asked = body.structured_outputs
    if asked is None:
        return []
    found = {"json_schema": asked.json_, "regex": asked.regex, "grammar": asked.grammar,
             "choice": asked.choice and tuple(asked.choice)}  # fmt: skip
    simple = [Constraint("json_object", None)] if asked.json_object else []
    return simple + [Constraint(kind, value) for kind, value in found.items() if value is not None]


def _biases(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), bias) for token, bias in given.items())
    except ValueError as error:
        raise RequestError(f"logit_bias: {error}; accepted are token ids as keys") from None
