// A load for a server's HTTP gateway, with k6 (https://k6.io):
//   SSL_CERT_FILE=ca.pem API_KEY=vn_... URL=https://localhost:8000 MODEL=chat k6 run load.js
// k6 shows how a whole answer takes; for times between tokens use veneer-loadtest.
import http from "k6/http";
import { check } from "k6";

export const options = {
  vus: Number(__ENV.STREAMS || 2),
  iterations: Number(__ENV.REQUESTS || 10),
  thresholds: { checks: ["rate==1"] }, // otherwise k6 exits with 0 whatever fails
};

const url = `${__ENV.URL || "http://localhost:8000"}/v1/completions`;
const headers = { "Content-Type": "application/json" };
if (__ENV.API_KEY) headers.Authorization = `Bearer ${__ENV.API_KEY}`;

export default function () {
  const body = { model: __ENV.MODEL || "smollm2-135m", prompt: "The sea", max_tokens: 8 };
  const answer = http.post(url, JSON.stringify(body), { headers });
  check(answer, {
    "status is 200": (r) => r.status === 200,
    "there is text": (r) => r.status === 200 && r.json("choices.0.text").length > 0,
  });
}
