// node search.js WORKER INDEX < queries: the search of a built site, by its own worker. Prints, for each
// line of queries, the first section of every page that is found, as JSON.
const fs = require("fs");

const [worker, index] = process.argv.slice(2);
let answer, listener;
globalThis.self = globalThis.window = globalThis;
globalThis.addEventListener = (_, given) => (listener = given);
globalThis.postMessage = (message) => answer(message);
(0, eval)(fs.readFileSync(worker, "utf8"));

const ask = (type, data) =>
  new Promise((resolve) => {
    answer = ({ data }) => resolve(data);
    listener({ data: { type, data } });
  });

(async () => {
  const options = { suggest: false };
  await ask(0, { ...JSON.parse(fs.readFileSync(index, "utf8")), options }); // 0: set up, 2: query
  for (const query of fs.readFileSync(0, "utf8").split("\n")) {
    const { items } = await ask(2, query);
    console.log(JSON.stringify(items.map(([first]) => first.location)));
  }
})();
