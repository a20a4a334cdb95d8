// A headless Chromium with one page. Expressions are run by the debugger, so that the page's policy need not allow eval.
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const DEADLINE = 60_000, PAUSE = 20; // milliseconds
let browser, page, faults = [];

export async function open([url]) {
  browser ??= await puppeteer.launch({
    args: [...chromium.args, "--disable-background-networking"], executablePath: await chromium.executablePath(), headless: "shell",
  });
  await page?.close();
  [page, faults] = [await browser.newPage(), []];
  await page.setViewport({ width: 1000, height: 700 });
  page.on("pageerror", error => faults.push(error.message));
  page.on("console", message => message.type() === "error" && faults.push(message.text()));
  await page.goto(url);
  return browser.version();
}

export const type = ([selector, text]) => page.type(selector, text);
export const click = ([selector]) => page.click(selector);
export const evaluate = ([expression]) => page.evaluate(expression);
export const errors = () => faults;
export const screenshot = ([path]) => page.screenshot({ path }).then(() => path);

export async function press([key, held]) {
  if (held) await page.keyboard.down(held);
  await page.keyboard.press(key);
  if (held) await page.keyboard.up(held);
}

export async function fill([selector, text]) {
  await page.click(selector, { count: 3 });
  await page.keyboard.press("Backspace");
  await page.type(selector, text);
}

export async function until([expression]) {
  const end = Date.now() + DEADLINE;
  for (;;) {
    const value = await page.evaluate(expression);
    if (value) return value;
    if (Date.now() > end) throw new Error(`never true: ${expression}; the page: ${await page.evaluate("document.body.innerText")}`);
    await new Promise(done => setTimeout(done, PAUSE));
  }
}

export const close = () => browser?.close();
