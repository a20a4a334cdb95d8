// The openai package of npm, with the names of scripts/openai_calls.py.
import OpenAI from "openai";

const client = at => new OpenAI({ baseURL: at.base_url, apiKey: at.api_key, maxRetries: at.max_retries });

const method = (on, path) => {
  const names = path.split("."), last = names.pop();
  const resource = names.reduce((found, name) => found[name], on);
  return resource[last].bind(resource);
};

const body = ({ extra_body, ...rest }) => ({ ...rest, ...extra_body });

export async function call([at, path, ...args], kwargs) {
  const given = Object.keys(kwargs).length ? [...args, body(kwargs)] : args;
  const answer = await method(client(at), path)(...given);
  if (!answer[Symbol.asyncIterator]) return answer;
  const parts = [];
  for await (const part of answer) parts.push(part);
  return answer.data ? { object: answer.object, data: parts } : parts; // a page, or a stream
}

export async function leave([at, path, after], kwargs) {
  const stream = await method(client(at), path)(body({ ...kwargs, stream: true }));
  let read = 0;
  for await (const _ of stream) if (++read === after) break;
  return read;
}

export async function many([at, path, asked]) {
  const one = client(at);
  return Promise.all(asked.map(async kwargs => {
    const parts = [];
    for await (const part of await method(one, path)(body({ ...kwargs, stream: true }))) parts.push(part);
    return parts;
  }));
}

export async function stream_helper([at], kwargs) {
  const stream = client(at).chat.completions.stream(body(kwargs)), contents = [];
  stream.on("content", delta => contents.push(delta));
  return { contents, final: await stream.finalChatCompletion() };
}
