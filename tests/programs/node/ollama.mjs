// ollama: its JavaScript client, with a tool whose result it sends back, whole and streamed.
import assert from "node:assert";
import { Ollama } from "ollama";

const client = new Ollama({ host: process.env.URL.replace("/v1", "") });
const tools = [
  {
    type: "function",
    function: {
      name: "paint",
      description: "Paint the wall.",
      parameters: {
        type: "object",
        properties: { colour: { type: "string" } },
        required: ["colour"],
      },
    },
  },
];
const given = { model: process.env.CALLER, tools, options: { temperature: 0, num_predict: 48 } };
const messages = [{ role: "user", content: "Paint it red." }];
const { message } = await client.chat({ ...given, messages });
const [call] = message.tool_calls;
assert.strictEqual(call.function.name, "paint");
assert.ok(["red", "blue", "green"].includes(call.function.arguments.colour));
messages.push(message, { role: "tool", tool_name: "paint", content: "It is red now." });
let text = "";
for await (const part of await client.chat({ ...given, messages, stream: true })) {
  text += part.message.content;
}
assert.ok(text.length > 0);
const { models } = await client.list();
assert.ok(models.some((each) => each.model.startsWith(process.env.MODEL)));
