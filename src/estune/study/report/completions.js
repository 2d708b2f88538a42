
// All completions: searched, and one prompt followed through the evaluations. Texts go in as text, never as HTML.

const MORE = 12; // completions shown at a time

function made(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Show a text with what was searched for in it marked. */
function marked(text, wanted) {
  const element = made("pre");
  const low = text.toLowerCase();
  let from = 0;
  if (wanted && low.length === text.length) {
    for (let at = low.indexOf(wanted); at >= 0; at = low.indexOf(wanted, from)) {
      element.append(text.slice(from, at), made("mark", "", text.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
  }
  element.append(text.slice(from));
  return element;
}

/** What an answer's turns are; a plain text is one, of nobody in particular. */
function turns(answer) {
  return typeof answer === "string" ? [["", answer]] : answer;
}

function answered(data, row, when, wanted, kind) {
  const [, answer, reward, finished] = row;
  const section = made("section", kind);
  const head = made("p", "when");
  head.append(
    made("span", "", when + (finished ? "" : ", cut off")),
    made("span", "reward", "reward " + (reward === null ? "none" : reward)),
  );
  section.append(head);
  for (const [who, said] of turns(data.answers[answer])) {
    if (who) section.append(made("p", "who", who));
    section.append(marked(said || "(nothing)", wanted));
  }
  return section;
}

/** Choose a held-out prompt and see its answers; returns what shows the prompt of a number. */
function followed(part, data) {
  const follower = part.querySelector(".follower");
  const tables = data.tables.filter((table) => table.kind === "held out");
  if (!follower || !tables.length) return null;
  const select = follower.querySelector("select");
  const answers = follower.querySelector(".answers");
  const numbers = [...new Set(tables.flatMap((table) => table.rows.map((row) => row[0])))].sort((a, b) => a - b);
  numbers.forEach((number, i) => {
    const text = data.prompts[number].replace(/\s+/g, " ").trim();
    const option = made("option", "", i + 1 + ": " + (text.length > 90 ? text.slice(0, 90) + "…" : text));
    option.value = number;
    select.append(option);
  });

  const show = (number) => {
    select.value = number;
    follower.querySelector("pre.prompt").textContent = data.prompts[number];
    let before = null;
    const sections = [];
    for (const table of tables) {
      const rows = table.rows.filter((row) => row[0] === number);
      for (const row of rows) {
        const turn = before === null || row[2] === null || row[2] === before ? "" : row[2] > before ? "better" : "worse";
        sections.push(answered(data, row, "step " + table.step, "", "answer " + turn));
      }
      if (rows.length) before = rows[rows.length - 1][2];
    }
    answers.replaceChildren(...sections);
  };

  select.addEventListener("change", () => show(Number(select.value)));
  for (const button of follower.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const at = select.selectedIndex + Number(button.dataset.move);
      show(numbers[(at + numbers.length) % numbers.length]);
    });
  }
  show(numbers[0]);
  follower.hidden = false;
  return (number) => {
    show(number);
    follower.scrollIntoView({ block: "start" });
    select.focus({ preventScroll: true });
  };
}

function searched(part, data, follow) {
  const finder = part.querySelector(".finder");
  const [input, among, by] = ["input", ".among", ".by"].map((name) => finder.querySelector(name));
  const [count, hits, more] = [".count", ".hits", ".more"].map((name) => finder.querySelector(name));
  for (const kind of ["everything", ...new Set(data.tables.map((table) => table.kind))]) {
    among.append(made("option", "", kind));
  }
  if (data.opening || data.ending) {
    const ends = finder.querySelector(".ends");
    ends.querySelector("pre").append(data.opening, made("b", "", "⟨…⟩"), data.ending);
    ends.hidden = false;
  }
  const all = data.tables.flatMap((table) => table.rows.map((row) => ({ table, row })));
  let low = null; // prompts and answers in lower case, made at the first search
  let found = all;
  let wanted = "";

  const hit = ({ table, row }) => {
    const article = made("article", "hit");
    const when = table.name + (row[4] >= 0 ? ", member " + row[4] : "");
    const prompt = marked(data.prompts[row[0]], wanted);
    prompt.className = "prompt";
    article.append(prompt, answered(data, row, when, wanted, "answer"));
    if (follow && table.kind === "held out") {
      const button = made("button", "", "Follow this prompt");
      button.type = "button";
      button.addEventListener("click", () => follow(row[0]));
      article.append(button);
    }
    return article;
  };

  const grow = () => {
    const shown = hits.children.length;
    hits.append(...found.slice(shown, shown + MORE).map(hit));
    more.hidden = hits.children.length >= found.length;
  };

  const search = () => {
    wanted = input.value.toLowerCase();
    low ??= [data.prompts, data.answers].map((texts) =>
      texts.map((text) => turns(text).map(([, said]) => said.toLowerCase()).join("\n")),
    );
    const [prompts, answers] = low.map((texts) => texts.map((text) => text.includes(wanted)));
    const kind = among.selectedIndex ? among.value : null;
    found = all.filter(({ table, row }) => (!kind || table.kind === kind) && (prompts[row[0]] || answers[row[1]]));
    const sign = Number(by.value);
    if (sign) found.sort((a, b) => sign * ((a.row[2] ?? sign * Infinity) - (b.row[2] ?? sign * Infinity)) || 0);
    count.textContent = found.length.toLocaleString("en") + " of " + all.length.toLocaleString("en") + " completions";
    hits.replaceChildren();
    grow();
  };

  input.addEventListener("input", search);
  among.addEventListener("change", search);
  by.addEventListener("change", search);
  more.addEventListener("click", grow);
  search();
  finder.hidden = false;
}

for (const part of document.querySelectorAll(".kept")) {
  const data = JSON.parse(part.querySelector(":scope > script").textContent);
  searched(part, data, followed(part, data));
}

// Buttons that copy: made here, as they need a script.

function copy(source, button) {
  const told = (text) => {
    button.textContent = text;
    setTimeout(() => (button.textContent = "Copy"), 2000);
  };
  const byHand = () => {
    getSelection().selectAllChildren(source);
    told(document.execCommand("copy") ? "Copied" : "Press Ctrl+C");
  };
  if (navigator.clipboard) navigator.clipboard.writeText(source.textContent).then(() => told("Copied"), byHand);
  else byHand();
}

for (const source of document.querySelectorAll("pre.command, code.copied")) {
  const button = made("button", "copy", "Copy");
  button.type = "button";
  button.setAttribute("aria-live", "polite");
  button.addEventListener("click", () => copy(source, button));
  source.after(button);
}

// A link into a run that is folded up opens it.

function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let box = target?.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  target?.scrollIntoView();
}

addEventListener("hashchange", unfold);
if (location.hash) unfold();
