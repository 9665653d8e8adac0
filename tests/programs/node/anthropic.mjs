// @anthropic-ai/sdk: its tool runner, whole and streamed.
import assert from "node:assert";
import Anthropic from "@anthropic-ai/sdk";
import { betaTool } from "@anthropic-ai/sdk/helpers/beta/json-schema";

const client = new Anthropic({ baseURL: process.env.URL.replace("/v1", ""), apiKey: "none" });
for (const stream of [false, true]) {
  const painted = [];
  const paint = betaTool({
    name: "paint",
    description: "Paint the wall.",
    inputSchema: {
      type: "object",
      properties: { colour: { type: "string" } },
      required: ["colour"],
    },
    run: ({ colour }) => {
      painted.push(colour);
      return `It is ${colour} now.`;
    },
  });
  const runner = client.beta.messages.toolRunner({
    model: process.env.CALLER,
    max_tokens: 48,
    tools: [paint],
    messages: [{ role: "user", content: "Paint it red." }],
    stream,
  });
  const last = await runner.runUntilDone();
  assert.ok(painted.length > 0, "the tool was not called");
  assert.strictEqual(last.content[0].type, "text");
  assert.ok(last.content[0].text.length > 0);
}
