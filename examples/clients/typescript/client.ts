// Publishes an adapter, generates with it whole and streamed, and shows how an
// error and an abandoned stream look. Prints what it found as one JSON object.
//
//   node dist/client.js ADDRESS ADAPTER_FOLDER
//
// A key in VENEER_API_KEY is sent along; with one, use an https address too.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

import { BadRequestSchema, ErrorInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import {
  AdapterService,
  type UploadAdapterRequest,
  UploadAdapterRequestSchema,
} from "./gen/veneer_proto/v1/adapters_pb.js";
import {
  FinishReason,
  type GenerateRequestSchema,
  InferenceService,
} from "./gen/veneer_proto/v1/inference_pb.js";
import { ServerService } from "./gen/veneer_proto/v1/server_pb.js";

const CHUNK_BYTES = 1 << 20;

/** The messages of an upload: first what the files are, then their bytes. */
async function* upload(folder: string, name: string): AsyncGenerator<UploadAdapterRequest> {
  const contents = new Map(
    readdirSync(folder).map((file) => [file, readFileSync(join(folder, file))]),
  );
  const files = [...contents].map(([file, data]) => ({
    name: file,
    size: BigInt(data.length),
    sha256: createHash("sha256").update(data).digest("hex"),
  }));
  const spec = { name, files, allowReplace: true };
  yield create(UploadAdapterRequestSchema, { message: { case: "spec", value: spec } });
  for (const [file, data] of contents) {
    for (let at = 0; at < data.length; at += CHUNK_BYTES) {
      const chunk = { file, offset: BigInt(at), data: data.subarray(at, at + CHUNK_BYTES) };
      yield create(UploadAdapterRequestSchema, { message: { case: "chunk", value: chunk } });
    }
  }
}

function request(
  adapter: string,
  maxTokens: number,
  topP?: number,
): MessageInitShape<typeof GenerateRequestSchema> {
  return {
    adapter,
    input: { case: "prompt", value: "The sea is" },
    sampling: { temperature: 0, seed: 7n, topP },
    stopping: { maxTokens, ignoreEos: true },
    output: { logprobs: true },
  };
}

/** The error that a call must end with. */
async function failed(call: () => Promise<unknown>): Promise<ConnectError> {
  try {
    await call();
  } catch (error) {
    return ConnectError.from(error);
  }
  throw new Error("the call was to fail");
}

async function run(address: string, folder: string): Promise<object> {
  const key = process.env.VENEER_API_KEY;
  const authorize: Interceptor = (next) => (call) => {
    if (key) call.header.set("authorization", `Bearer ${key}`);
    return next(call);
  };
  const transport = createGrpcTransport({
    baseUrl: address.includes("://") ? address : `http://${address}`,
    interceptors: [authorize],
    defaultTimeoutMs: 60_000,
  });
  const inference = createClient(InferenceService, transport);
  const info = await createClient(ServerService, transport).getServerInfo({});
  const adapters = createClient(AdapterService, transport);
  const { adapter } = await adapters.uploadAdapter(upload(folder, "from-typescript"));
  if (adapter === undefined) throw new Error("an upload's answer has the adapter");

  const whole = await inference.generate(request(adapter.name, 8));
  let streamed = "";
  let finish = FinishReason.UNSPECIFIED;
  let usage = { promptTokens: 0, completionTokens: 0 };
  for await (const message of inference.generateStream(request(adapter.name, 8))) {
    streamed += message.text;
    finish = message.final?.finishReason ?? finish;
    usage = message.final?.usage ?? usage;
  }
  const refusal = await failed(() => inference.generate(request(adapter.name, 8, 3)));

  // A stream ends when its signal says so; the server then ends the work too.
  const leaving = new AbortController();
  const abandoned = await failed(async () => {
    const messages = inference.generateStream(request(adapter.name, 32), {
      signal: leaving.signal,
    });
    for await (const _ of messages) leaving.abort();
  });
  return {
    base: info.baseModel?.name,
    revision: adapter.revision,
    text: whole.text,
    streamed,
    finish: FinishReason[finish],
    tokens: whole.tokenIds,
    logprobs: whole.logprobs.map((score) => score.logprob),
    prompt_tokens: usage.promptTokens,
    completion_tokens: usage.completionTokens,
    refused: {
      code: Code[refusal.code],
      reason: refusal.findDetails(ErrorInfoSchema)[0]?.reason,
      field: refusal.findDetails(BadRequestSchema)[0]?.fieldViolations[0]?.field,
    },
    abandoned: Code[abandoned.code],
  };
}

const [address, folder] = process.argv.slice(2);
if (address === undefined || folder === undefined) {
  console.error("give the server's address and an adapter's folder");
  process.exit(2);
}
console.log(JSON.stringify(await run(address, folder)));
