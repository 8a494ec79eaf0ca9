// Streams over both faces at once, each read to its end and checked event by event.
//
// Environment: HTTP_URL, GRPC_ADDRESS, MODEL, PROTOS (a folder laid out as ostro/v1), SUMMARY.

import { check } from "k6";
import { Counter } from "k6/metrics";
import grpc from "k6/net/grpc";
import http from "k6/http";

const USERS = 4;
const TURNS = 5;
const EFFORTS = ["none", "low", "high"];
const SUMS = [[38, 45, 61], [17, 25, 9], [52, 11, 30]];

const ended = new Counter("streams_ended");
const failed = new Counter("streams_failed");

const scenario = (exec) => ({
  executor: "per-vu-iterations",
  exec,
  vus: USERS,
  iterations: TURNS,
  maxDuration: "150s",
});

export const options = {
  scenarios: { http: scenario("overHttp"), grpc: scenario("overGrpc") },
  noUsageReport: true,
};

const client = new grpc.Client();
client.load([__ENV.PROTOS], "ostro/v1/generation.proto");

function question() {
  const turn = __VU + __ITER;
  return {
    effort: EFFORTS[turn % EFFORTS.length],
    text: `What is ${SUMS[turn % SUMS.length].join(" + ")}?`,
  };
}

// What holds of every stream. `kinds` are its events: "start", "thinking", "answer", "finish"
// and "end".
function verify(face, effort, kinds, usage, reason) {
  const order = kinds.filter((kind, i) => kind !== kinds[i - 1]).join(" ");
  const thinks = effort !== "none";
  const good = check(null, {
    [`${face}: the events come in their order`]: () =>
      order === (thinks ? "start thinking answer finish end" : "start answer finish end"),
    [`${face}: it begins, finishes and ends once`]: () =>
      ["start", "finish", "end"].every((once) => kinds.filter((k) => k === once).length === 1),
    [`${face}: the answer is finished`]: () => reason === "stop",
    [`${face}: the tokens are counted`]: () =>
      usage.prompt > 0 && usage.completion > usage.thinking && usage.thinking > 0 === thinks,
  });
  (good ? ended : failed).add(1, { face });
}

export function overHttp() {
  const { effort, text } = question();
  const body = {
    model: __ENV.MODEL,
    messages: [{ role: "user", content: text }],
    reasoning_effort: effort,
    stream: true,
  };
  const answer = http.post(`${__ENV.HTTP_URL}/v1/chat/completions`, JSON.stringify(body), {
    headers: { "content-type": "application/json" },
    timeout: "120s",
  });
  if (answer.status !== 200) {
    failed.add(1, { face: "http" });
    console.error(`HTTP ${answer.status}: ${answer.body}`);
    return;
  }
  const lines = answer.body.split("\n\n").filter((line) => line.startsWith("data: "));
  const kinds = [];
  let usage = {};
  let reason;
  for (const data of lines.map((line) => line.slice(6))) {
    if (data === "[DONE]") {
      kinds.push("end");
      continue;
    }
    const chunk = JSON.parse(data);
    const { delta, finish_reason } = chunk.choices[0];
    if (delta.role) kinds.push("start");
    if (delta.reasoning_content) kinds.push("thinking");
    if (delta.content) kinds.push("answer");
    if (finish_reason) {
      kinds.push("finish");
      reason = finish_reason;
      usage = {
        prompt: chunk.usage.prompt_tokens,
        completion: chunk.usage.completion_tokens,
        thinking: chunk.usage.completion_tokens_details.reasoning_tokens,
      };
    }
  }
  verify("http", effort, kinds, usage, reason);
}

export function overGrpc() {
  const { effort, text } = question();
  if (__ITER === 0) client.connect(__ENV.GRPC_ADDRESS, { plaintext: true });
  const stream = new grpc.Stream(client, "ostro.v1.GenerationService/StreamChat");
  const kinds = [];
  let usage = {};
  let reason;
  let error;
  stream.on("data", ({ started, delta, finish, ended }) => {
    if (started) kinds.push("start");
    if (delta) kinds.push(delta.channel === "CHANNEL_THINKING" ? "thinking" : "answer");
    if (finish) {
      kinds.push("finish");
      reason = finish.reason.replace("FINISH_REASON_", "").toLowerCase();
    }
    if (ended) {
      kinds.push("end");
      usage = {
        prompt: ended.usage.promptTokens,
        completion: ended.usage.completionTokens,
        thinking: ended.usage.thinkingTokens || 0,
      };
    }
  });
  stream.on("error", (told) => {
    error = told;
    console.error(`gRPC ${told.code}: ${told.message}`);
  });
  stream.on("end", () => {
    if (error) failed.add(1, { face: "grpc" });
    else verify("grpc", effort, kinds, usage, reason);
  });
  stream.write({
    model: __ENV.MODEL,
    conversation: { messages: [{ role: "ROLE_USER", parts: [{ text }] }] },
    options: { reasoning: { effort: `REASONING_EFFORT_${effort.toUpperCase()}` } },
  });
  stream.end();
}

export function handleSummary({ metrics, root_group }) {
  const checks = root_group.checks.map(({ name, passes, fails }) => [name, [passes, fails]]);
  const count = (name) => (metrics[name] ? metrics[name].values.count : 0);
  const summary = {
    ended: count("streams_ended"),
    failed: count("streams_failed"),
    iterations: count("iterations"),
    checks: Object.fromEntries(checks),
  };
  return { [__ENV.SUMMARY]: JSON.stringify(summary) };
}
