
'use strict';

const data = JSON.parse(document.getElementById('data').textContent);
const SIGNS = {' ': '·', '\n': '⏎', '\t': '⇥'};
const LONGEST_REPLAY = 60; // seconds, as far as the speeds on offer allow

const QUANTITIES = [
  {name: 'entropy', unit: 'nats', scale: data.entropyScale, digits: 3},
  {name: 'movement', unit: '‖Δz̃‖/R', scale: data.scale, digits: 3},
];

const byId = (id) => document.getElementById(id);
const slotName = (slot) => (slot === 0 ? 'front' : `slot ${slot}`);
const format = (value, digits) => (value === null ? '–' : value.toFixed(digits).replace('-', '−'));
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** A new element holding `children`; text among them is never read as markup. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

/** `piece` as nodes: spaces at its edges, new lines and tabs become signs. */
function spell(piece) {
  return piece.split(/(^ +| +$|[\n\t])/).map((part, index) => (
    index % 2 ? make('i', 'mark', part.replace(/./gs, (c) => SIGNS[c])) : part)).filter((part) => part !== '');
}

/** One sample of N steps and K slots. A place {token, step, slot} is where a token of the text is at a step. */
class Run {
  constructor(stored) {
    Object.assign(this, stored);
    this.numSteps = this.committed.length;
    this.numSlots = this.maturity.length;
    this.numCandidates = this.candidates.length / this.tokens.length;
    this.numDrafts = this.drafts.length / this.numSteps;
    let sum = 0;
    this.before = this.committed.map((count) => (sum += count) - count);
    this.commitStep = this.committed.flatMap((count, step) => Array(count).fill(step));
  }

  /** Entry of a flat [N, K] array. */
  at(array, {step, slot}) {
    return array[step * this.numSlots + slot];
  }

  /** Entropy or movement at a place; null where it is not finite. */
  measure({name, scale}, place) {
    const whole = this.at(this[name], place);
    return whole === null ? null : whole / scale;
  }

  /** The nearest tokens at a place, nearest first; without recorded candidates the nearest one, cosine unknown. */
  nearest(place) {
    if (!this.numCandidates) return [{token: this.at(this.tokens, place), cosine: null}];
    const begin = (place.step * this.numSlots + place.slot) * this.numCandidates;
    return Array.from({length: this.numCandidates}, (_, rank) => {
      const cosine = this.cosines[begin + rank];
      return {token: this.candidates[begin + rank], cosine: cosine === null ? null : cosine / data.scale};
    });
  }

  /** Where a slot is at every step. */
  ofSlot(slot) {
    return this.before.map((before, step) => ({token: before + slot, step, slot}));
  }

  /** Where a token of the text has been, from birth on. */
  life(token) {
    return this.before.map((before, step) => ({token, step, slot: token - before}))
      .filter(({slot}) => slot >= 0 && slot < this.numSlots);
  }

  /** What a token of the text was committed as; undefined where the sample ended before. */
  fate(token) {
    const step = this.commitStep[token];
    return step === undefined ? undefined : this.at(this.tokens, {step, slot: token - this.before[step]});
  }
}

/** Curves of one quantity: the front over the steps, and what was chosen. */
class Chart {
  constructor(run, quantity) {
    Object.assign(this, {run, quantity, root: byId('chart').content.cloneNode(true).firstElementChild});
    this.find('.name').textContent = quantity.name;
    this.find('.unit').textContent = quantity.unit;
    this.find('svg').addEventListener('pointerdown', ({offsetX, currentTarget}) => {
      show(Math.round(this.begin + offsetX / currentTarget.clientWidth * (this.end - this.begin)));
    });
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  /** Takes the places to be drawn, between two steps. */
  take(front, chosen, begin, end) {
    const points = (places) => places.map((place) => [place.step, this.run.measure(this.quantity, place)]);
    Object.assign(this, {begin, end, front: points(front), chosen: points(chosen)});
  }

  /** Values that the vertical axis has to hold. */
  values() {
    return [...this.front, ...this.chosen].map(([, value]) => value).filter((value) => value !== null);
  }

  draw(low, high) {
    const {digits, name, unit} = this.quantity;
    const y = (value) => (high > low ? 100 * (high - value) / (high - low) : 50).toFixed(1);
    for (const series of ['front', 'chosen']) {
      let pen = 'M';
      const path = this[series].map(([step, value]) => {
        if (value === null) {
          pen = 'M';
          return '';
        }
        const point = `${pen}${this.x(step)} ${y(value)}`;
        // A curve of one point is seen only if it goes somewhere, if only to where it is.
        const drawn = pen === 'M' ? `${point}L${this.x(step)} ${y(value)}` : point;
        pen = 'L';
        return drawn;
      });
      this.find(`path.${series}`).setAttribute('d', path.join(''));
    }
    this.find('.top').textContent = format(high, digits);
    this.find('.bottom').textContent = high > low ? format(low, digits) : '';
    this.find('.first').textContent = this.begin + 1;
    this.find('.last').textContent = this.end > this.begin ? this.end + 1 : '';
    this.find('svg').setAttribute('aria-label', `${name}, ${unit}, steps ${this.begin + 1} to ${this.end + 1}`);
  }

  x(step) {
    return (this.end > this.begin ? 1000 * (step - this.begin) / (this.end - this.begin) : 500).toFixed(1);
  }

  /** Marks the current step and writes the values there. */
  mark(place) {
    const {run, quantity} = this;
    this.find('path.cursor').setAttribute('d', `M${this.x(place.step)} 0V100`);
    const read = (slot) => format(run.measure(quantity, {step: place.step, slot}), quantity.digits);
    this.find('.readings .front').textContent = `front ${read(0)}`;
    this.find('.readings .chosen').textContent = place.slot ? `${slotName(place.slot)} ${read(place.slot)}` : '';
  }
}

/** The part of the page that shows one run. */
class View {
  constructor(run) {
    Object.assign(this, {run, token: null, shown: 0, root: byId('run').content.cloneNode(true).firstElementChild});
    const count = (number, name) => `${number} ${name}${number === 1 ? '' : 's'}`;
    this.find('h2').textContent = run.title;
    this.find('.size').textContent = [count(run.commitStep.length, 'token'), count(run.numSteps, 'step'),
      count(run.numSlots, 'slot')].join(' · ');
    this.find('.text').setAttribute('aria-label', `Text of ${run.title}`);
    this.find('.prompt').textContent = run.prompt;
    this.spans = run.text.map((text, token) => this.makeSpan(text, token));
    this.find('.committed').append(...this.spans);
    this.chips = run.maturity.map((maturity, slot) => this.makeChip(maturity, slot));
    this.find('.tail').append(...this.chips);
    this.find('tbody').addEventListener('click', (event) => show(Number(event.target.closest('tr').dataset.step)));
    this.charts = QUANTITIES.map((quantity) => new Chart(run, quantity));
    this.find('.curves').append(...this.charts.map((chart) => chart.root));
    this.find('.settings').hidden = run.settings.length === 0;
    this.find('.settings dl').append(...run.settings.flatMap(([name, value]) => [make('dt', '', name),
      make('dd', '', value)]));
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  makeSpan(text, token) {
    const [, gap, ink] = text.match(/^( *)(.*)$/s);
    const span = make('span', '', gap, make('span', 'ink', ink));
    span.classList.toggle('newline', ink.startsWith('\n'));
    span.classList.toggle('end', this.run.fate(token) === data.end);
    span.dataset.token = token;
    span.hidden = true;
    span.addEventListener('click', () => this.chooseToken(token));
    return span;
  }

  makeChip(maturity, slot) {
    const chip = make('button', 'slot');
    chip.type = 'button';
    chip.dataset.slot = slot;
    chip.style.setProperty('--maturity', maturity / data.scale);
    chip.addEventListener('click', () => chooseSlot(slot));
    return chip;
  }

  chooseToken(token) {
    this.token = token;
    drawCharts();
    show(state.step);
  }

  /** The last step of this run that has been reached. */
  now() {
    return Math.min(state.step, this.run.numSteps - 1);
  }

  slot() {
    return Math.min(state.slot, this.run.numSlots - 1);
  }

  /** The place to be explained: the chosen slot now, or where the chosen token is, was last or will be first. */
  place() {
    const step = this.now();
    if (this.token === null) return {token: this.run.before[step] + this.slot(), step, slot: this.slot()};
    const life = this.run.life(this.token);
    return life.findLast((place) => place.step <= step) ?? life[0];
  }

  /** Gives the charts their curves: of a slot over all steps, of a token over its life. */
  takeCurves() {
    const chosen = this.token === null ? this.run.ofSlot(this.slot()) : this.run.life(this.token);
    const [begin, end] = this.token === null ? [0, lastStep] : [chosen[0].step, chosen.at(-1).step];
    const front = this.run.ofSlot(0).filter(({step}) => step >= begin && step <= end);
    this.charts.forEach((chart) => chart.take(front, chosen, begin, end));
  }

  draw() {
    const place = this.place();
    this.drawText(place);
    this.drawTail(place);
    this.drawDrafts();
    this.drawAbout(place);
    this.drawCandidates(place);
    this.drawLife(place);
    this.charts.forEach((chart) => chart.mark(place));
  }

  drawText(place) {
    const step = this.now();
    const end = this.run.before[step] + this.run.committed[step];
    // Only what changed is touched, so that a long text costs a step no more than a short one.
    for (let token = Math.min(end, this.shown); token < Math.max(end, this.shown); token++) {
      this.spans[token].hidden = token >= end;
    }
    this.shown = end;
    this.root.querySelectorAll('.committed > :is(.now, .chosen)').forEach((span) => {
      span.classList.remove('now', 'chosen');
    });
    this.spans.slice(this.run.before[step], end).forEach((span) => span.classList.add('now'));
    this.spans[place.token]?.classList.add('chosen');
  }

  drawTail(place) {
    const step = this.now();
    this.chips.forEach((chip, slot) => {
      const token = this.run.before[step] + slot;
      const nearest = this.run.at(this.run.tokens, {step, slot});
      const piece = data.pieces[nearest];
      const isChosen = token === place.token;
      chip.hidden = slot < this.run.committed[step];
      // A space in front of a word becomes the gap between two chips.
      chip.replaceChildren(...spell(piece.replace(/^ (?=\S)/, '')));
      chip.classList.toggle('joined', !/^\s/.test(piece));
      chip.classList.toggle('settled', nearest === this.run.fate(token));
      chip.setAttribute('aria-pressed', isChosen);
      chip.setAttribute('aria-label', `${slotName(slot)}: ${piece.trim() || 'white space'}`);
      chip.tabIndex = isChosen ? 0 : -1;
    });
  }

  /** What a step checked: the drafts that were right, and after the first that was not, those that no longer counted. */
  drawDrafts() {
    const {numDrafts, drafts, committed} = this.run;
    const step = this.now();
    const tokens = drafts.slice(step * numDrafts, (step + 1) * numDrafts).filter((token) => token >= 0);
    // A draft that the budget cut off was right too: it is the token that was committed last.
    const last = committed[step] - 1;
    const right = (token, place) => place < last
      || (place === last && token === this.run.at(this.run.tokens, {step, slot: last}));
    this.find('.drafts').hidden = numDrafts === 0;
    this.find('.drafts').replaceChildren(tokens.length ? 'checked ' : 'nothing to check', ...tokens.flatMap((token, place) => [
      make('span', right(token, place) ? 'word fate' : 'word rejected', ...spell(data.pieces[token])), ' ']));
  }

  drawAbout({token, slot}) {
    const maturity = `${slotName(slot)} · α ${format(this.run.maturity[slot] / data.scale, 2)} · token ${token + 1}, `;
    const fate = this.run.fate(token);
    this.find('.about').replaceChildren(maturity, ...(fate === undefined ? ['not committed when the sample ended'] : [
      `committed at step ${this.run.commitStep[token] + 1} as `, make('strong', '', ...spell(data.pieces[fate]))]));
  }

  /** A token as a word that stands out where it is what will be committed. */
  word(token, fate) {
    return make('span', token === fate ? 'word fate' : 'word', ...spell(data.pieces[token]));
  }

  drawCandidates(place) {
    const fate = this.run.fate(place.token);
    this.find('.candidates ol').replaceChildren(...this.run.nearest(place).map(({token, cosine}) => {
      const bar = make('span', 'bar');
      bar.style.setProperty('--share', clamp(cosine ?? 0, 0, 1));
      return make('li', '', this.word(token, fate), make('span', 'cosine', format(cosine, 3)), bar);
    }));
  }

  drawLife(chosen) {
    const fate = this.run.fate(chosen.token);
    this.find('tbody').replaceChildren(...this.run.life(chosen.token).map((place) => {
      const values = [place.step + 1, place.slot || 'front', format(this.run.maturity[place.slot] / data.scale, 2),
        ...QUANTITIES.map((quantity) => format(this.run.measure(quantity, place), quantity.digits))];
      const row = make('tr', '', ...values.map((value) => make('td', '', value)),
        make('td', '', ...this.run.nearest(place).map(({token}) => this.word(token, fate))));
      row.dataset.step = place.step;
      if (place.step === chosen.step) row.setAttribute('aria-current', 'step');
      return row;
    }));
  }

  /** Keeps the end of the text in sight as it grows. */
  follow() {
    this.find('.text').scrollTop = this.find('.text').scrollHeight;
  }
}

const views = data.runs.map((stored) => new View(new Run(stored)));
const lastStep = Math.max(...views.map(({run}) => run.numSteps)) - 1;
const lastSlot = Math.max(...views.map(({run}) => run.numSlots)) - 1;
const state = {step: 0, slot: Math.ceil(lastSlot / 2), timer: null};

/** Draws the curves of all runs on the same vertical axes. */
function drawCharts() {
  views.forEach((view) => view.takeCurves());
  QUANTITIES.forEach((_, index) => {
    const charts = views.map((view) => view.charts[index]);
    const values = charts.flatMap((chart) => chart.values());
    charts.forEach((chart) => chart.draw(Math.min(...values), Math.max(...values)));
  });
}

function chooseSlot(slot) {
  state.slot = clamp(slot, 0, lastSlot);
  views.forEach((view) => { view.token = null; });
  drawCharts();
  show(state.step);
}

/** Chooses the token `by` further on in the run that has the focus, or in the first one. */
function chooseNextToken(by) {
  const view = views.find(({root}) => root.contains(document.activeElement)) ?? views[0];
  view.chooseToken(clamp(view.place().token + by, 0, view.run.commitStep.length - 1));
}

/** Shows `step`, counted from 0. */
function show(step) {
  const isNew = step !== state.step;
  state.step = clamp(step, 0, lastStep);
  views.forEach((view) => view.draw());
  if (isNew) views.forEach((view) => view.follow());
  byId('scrub').value = state.step + 1;
  byId('scrub').setAttribute('aria-valuetext', `step ${state.step + 1} of ${lastStep + 1}`);
  byId('count').textContent = `step ${state.step + 1} / ${lastStep + 1}`;
  byId('status').textContent = `step ${state.step + 1}: ${views.map(({run, spans}) => (
    spans.filter((span) => span.classList.contains('now')).map((span) => span.textContent).join(''))).join('; ')}`;
}

function setPlaying(isPlaying) {
  clearTimeout(state.timer);
  state.timer = isPlaying ? setTimeout(advance, 1000 / Number(byId('speed').value)) : null;
  document.documentElement.classList.toggle('playing', isPlaying);
  byId('play').setAttribute('aria-label', isPlaying ? 'Pause' : 'Play');
  byId('status').setAttribute('aria-live', isPlaying ? 'off' : 'polite');
}

function advance() {
  show(state.step + 1);
  setPlaying(state.step < lastStep);
}

function togglePlaying() {
  if (state.timer === null && state.step === lastStep) show(0);
  setPlaying(state.timer === null);
}

/** Shows `step` because somebody asked for it. */
function go(step) {
  setPlaying(false);
  show(step);
}

const KEYS = {
  ' ': togglePlaying,
  ArrowLeft: () => go(state.step - 1),
  ArrowRight: () => go(state.step + 1),
  Home: () => go(0),
  End: () => go(lastStep),
  ArrowUp: () => chooseSlot(state.slot - 1),
  '[': () => chooseSlot(state.slot - 1),
  ArrowDown: () => chooseSlot(state.slot + 1),
  ']': () => chooseSlot(state.slot + 1),
  ',': () => chooseNextToken(-1),
  '.': () => chooseNextToken(1),
  '?': () => byId('help').showModal(),
};

/** Whether a key means something of its own where the focus is. */
function isTaken({key, target}) {
  return byId('help').open || target.matches('select') || (key === ' ' && target.matches('button:not(.slot), summary'));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || isTaken(event) || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
}

byId('runs').append(...views.map(({root}) => root));
byId('runs').classList.toggle('two', views.length === 2);
byId('scrub').max = lastStep + 1;
const speeds = [...byId('speed').options].map((option) => Number(option.value));
byId('speed').value = speeds.slice(1).find((speed) => lastStep / speed <= LONGEST_REPLAY) ?? speeds.at(-1);
byId('scrub').addEventListener('input', ({target}) => go(Number(target.value) - 1));
byId('back').addEventListener('click', () => go(state.step - 1));
byId('forth').addEventListener('click', () => go(state.step + 1));
byId('play').addEventListener('click', togglePlaying);
byId('help-button').addEventListener('click', () => byId('help').showModal());
// A button pressed with the mouse takes no focus, so that the space bar goes on meaning play or pause.
byId('controls').addEventListener('mousedown', (event) => {
  if (event.target.closest('button')) event.preventDefault();
});
document.addEventListener('keydown', onKey);
// Some browsers press a button when the space bar comes up, whatever became of its going down.
document.addEventListener('keyup', (event) => {
  if (event.key === ' ' && event.target.matches('.slot')) event.preventDefault();
});
byId('controls').hidden = false;
drawCharts();
show(0);
document.documentElement.dataset.ready = '';
