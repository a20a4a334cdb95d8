"""The langchain-openai package. `at`: options of its chat model."""

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def invoke(at: dict, asked) -> dict:
    return ChatOpenAI(**at).invoke(asked).model_dump(mode="json")


def stream(at: dict, asked) -> list[dict]:
    return [part.model_dump(mode="json") for part in ChatOpenAI(**at, stream_usage=True).stream(asked)]


def batch(at: dict, asked: list) -> list[str]:
    return [message.content for message in ChatOpenAI(**at).batch(asked)]


def chain(at: dict, words: dict[str, str]) -> str:
    """A prompt with words filled in, then the model."""
    prompt = ChatPromptTemplate.from_messages([("system", "Answer in {manner}."), ("human", "What is {thing}?")])
    return (prompt | ChatOpenAI(**at)).invoke(words).content


def structured(at: dict, schema: dict, method: str, asked) -> dict:
    """with_structured_output: method json_schema or function_calling."""
    return ChatOpenAI(**at).with_structured_output(schema, method=method).invoke(asked)


def bound(at: dict, tool: dict, choice: str, asked) -> list[dict]:
    """Tool calls of a model that is bound to one tool."""
    return ChatOpenAI(**at).bind_tools([tool], tool_choice=choice).invoke(asked).tool_calls
