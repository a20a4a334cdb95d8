// Runs functions of one module: `node worker.mjs ./MODULE.mjs`, calls on stdin, answers on stdout, a line of JSON each.
import { createInterface } from "node:readline";

const kinds = error => {
  const found = [];
  for (let kind = error.constructor; kind?.name; kind = Object.getPrototypeOf(kind)) found.push(kind.name);
  return found;
};

const told = error => ({
  kinds: kinds(error), message: error.message, status: error.status ?? null, code: error.code ?? null,
  param: error.param ?? null, retry_after: error.headers?.get?.("retry-after") ?? null,
});

const calls = await import(process.argv[2]);
for await (const line of createInterface({ input: process.stdin })) {
  const { name, args, kwargs } = JSON.parse(line);
  let answer;
  try {
    answer = { value: (await calls[name](args, kwargs)) ?? null };
  } catch (error) {
    answer = { error: told(error) };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
await calls.close?.();
