// Calls a running cluster through what @grpc/proto-loader makes of our protos, and writes what came
// as one JSON object.
// Arguments: the gRPC face's address, then the folders to look for .proto files in.

import * as grpc from "@grpc/grpc-js";
import * as loader from "@grpc/proto-loader";

const [address, ...includeDirs] = process.argv.slice(2);
const definition = loader.loadSync(
  [
    "ostro/v1/generation.proto",
    "ostro/v1/cluster.proto",
    "google/rpc/status.proto",
    "google/rpc/error_details.proto",
  ],
  { includeDirs, keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true },
);
const { ostro } = grpc.loadPackageDefinition(definition);
const credentials = grpc.credentials.createInsecure();
const generation = new ostro.v1.GenerationService(address, credentials);
const cluster = new ostro.v1.ClusterService(address, credentials);
const within = () => ({ deadline: Date.now() + 60_000 });

const ask = (maxTokens, more = {}) => ({
  conversation: { messages: [{ role: "ROLE_USER", parts: [{ text: "What is 2 + 2?" }] }] },
  options: {
    sampling: { temperature: 0 },
    stopping: { max_tokens: maxTokens, ignore_eos: true },
    return_token_ids: true,
  },
  ...more,
});

const unary = (client, method, request) =>
  new Promise((resolve, reject) =>
    client[method](request, new grpc.Metadata(), within(), (error, answer) =>
      error ? reject(error) : resolve(answer),
    ),
  );

// The details of a status, by the name of their type.
const details = (error) => {
  const [packed] = error.metadata.get("grpc-status-details-bin");
  const status = definition["google.rpc.Status"].deserialize(packed);
  return Object.fromEntries(
    status.details.map(({ type_url, value }) => {
      const name = type_url.split("/").pop();
      return [name, definition[name].deserialize(value)];
    }),
  );
};

const stream = async (request, onEvent = () => {}) => {
  const events = [];
  for await (const event of generation.StreamChat(request, new grpc.Metadata(), within())) {
    events.push(event);
    await onEvent(event);
  }
  return events;
};

const chat = await unary(generation, "Chat", ask(8));
const streamed = await stream(ask(8));

let applied = false;
const cancelled = await stream(ask(20_000, { request_id: "node-cancels" }), async (event) => {
  if (event.event === "started") {
    const control = { request_id: "node-cancels", action: "ACTION_CANCEL" };
    ({ applied } = await unary(generation, "ControlGeneration", control));
  }
});

const refusal = await unary(generation, "Chat", {
  ...ask(8),
  options: { sampling: { temperature: -3 } },
}).catch((error) => error);

console.log(
  JSON.stringify({
    model: await unary(cluster, "GetModel", {}),
    chat,
    kinds: streamed.map(({ event }) => event),
    token_ids: streamed.flatMap(({ delta }) => delta?.token_ids ?? []),
    applied,
    cancelled: cancelled.find(({ event }) => event === "finish")?.finish.reason,
    refusal: { code: refusal.code, details: details(refusal) },
  }),
);
generation.close();
cluster.close();
