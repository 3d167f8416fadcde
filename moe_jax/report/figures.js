// Draws every <figure data-figure=NAME> as SVG from the JSON of the page, in the page's colours.
const figures = JSON.parse(document.getElementById('figures').textContent);
const escaped = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const short = (text, n) => text.length > n ? text.slice(0, n - 1) + '…' : text;
const tip = document.getElementById('tip');
const paint = i => `var(--s${i % 8})`;

// 16-bit weights, a row of them for each row of the figure; NaN where nothing was measured.
function decoded(text, low, high) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return Array.from(new Uint16Array(bytes.buffer),
    v => v === 65535 ? NaN : low + (high - low) * v / 65534);
}

function shown(value) { return Number.isFinite(value) ? value.toFixed(3) : '–'; }

function say(event, lines) {
  tip.innerHTML = lines.map(escaped).join('<br>');
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), width = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, width - box.width - 8))}px`;
  tip.style.top = `${event.clientY + 16 + box.height > innerHeight ?
    event.clientY - box.height - 8 : event.clientY + 16}px`;
}

// Says what is under the pointer (or the finger), by the element's data-i.
function explain(element, lines) {
  const show = event => {
    const mark = event.target.closest('[data-i]');
    if (mark) say(event, lines(+mark.dataset.i)); else tip.hidden = true;
  };
  element.addEventListener('pointermove', show);
  element.addEventListener('pointerdown', show);
  element.addEventListener('pointerleave', () => { tip.hidden = true; });
}

function labelled(text, control) {
  const label = document.createElement('label');
  label.append(`${text} `, control);
  return label;
}

function select(choices) {  // [[group, [[value, text], ...]], ...]
  const element = document.createElement('select');
  element.innerHTML = choices.filter(([, options]) => options.length).map(([group, options]) =>
    `<optgroup label="${escaped(group)}">${options.map(([value, text]) =>
      `<option value="${escaped(value)}">${escaped(text)}</option>`).join('')}</optgroup>`).join('');
  return element;
}

function heatmap(figure, spec) {
  const rows = spec.rows.length, columns = spec.columns.length;
  const frames = spec.frames.map(f => decoded(f.values, spec.low, spec.high));
  let frame = frames.length - 1, order = spec.rows.map((_, i) => i);
  const at = (r, c) => frames[frame][r * columns + c];
  const category = r => (spec.groups[0] || [])[r] || '';
  const controls = document.createElement('div');
  controls.className = 'controls';
  const plot = document.createElement('div');
  plot.className = 'scroll plot';
  figure.prepend(controls, plot);

  const orders = {
    given: () => 0,
    name: (a, b) => spec.rows[a].localeCompare(spec.rows[b]),
    ...Object.fromEntries(Object.entries(spec.orders).map(([name, rank]) =>
      [`order ${name}`, (a, b) => rank[a] - rank[b]])),
  };
  const names = [...new Set(spec.groups[0] || [])];
  if (spec.sortable) {
    const menu = select([
      ['rows', [['given', spec.given], ['name', 'name'],
        ...Object.keys(spec.orders).map(name => [`order ${name}`, name])]],
      ['first the category', names.map((name, i) => [`category ${i}`, name])],
      ['by weight of', spec.columns.map((name, i) => [`column ${i}`, name])],
    ]);
    menu.className = 'sort';
    menu.addEventListener('change', () => { sort(menu.value); draw(); });
    controls.append(labelled('Sort by', menu));
    plot.addEventListener('click', event => {
      const head = event.target.closest('[data-column]');
      if (!head) return;
      menu.value = `column ${head.dataset.column}`;
      menu.dispatchEvent(new Event('change'));
    });
  }
  if (frames.length > 1) {
    const slider = document.createElement('input'), now = document.createElement('output');
    Object.assign(slider, {type: 'range', min: 0, max: frames.length - 1, value: frame});
    const step = () => { frame = +slider.value; now.textContent = spec.frames[frame].label; draw(); };
    slider.addEventListener('input', step);
    now.textContent = spec.frames[frame].label;
    controls.append(labelled(spec.slider, slider), now);
  }
  function sort(key) {
    const [kind, number] = [key.split(' ')[0], +key.split(' ')[1]];
    let compare = orders[key];
    if (kind === 'column') compare = (a, b) => at(b, number) - at(a, number);
    if (kind === 'category') {
      compare = (a, b) => (category(b) === names[number]) - (category(a) === names[number]);
    }
    order = spec.rows.map((_, i) => i).sort((a, b) => compare(a, b) || a - b);
  }
  function draw() {
    const room = figure.clientWidth - 4, narrow = room < 600;
    const characters = Math.min(narrow ? 16 : 40, Math.max(...spec.rows.map(r => r.length)));
    const left = 6.2 * characters + 8, right = names.length && !narrow ? 150 : 4;
    const cell = Math.max(5, Math.min(spec.square ? 14 : 26, (room - left - right) / columns));
    const height = rows > 60 ? 12 : 15;
    const size = Math.max(...spec.blocks.map(b => b.length * 6)), first = spec.blocks.length > 1;
    const wide = first ? cell * columns / spec.blocks.length : 0;
    const top = first ? (wide > size + 4 ? 18 : size + 10) : 4;
    const numbers = cell >= 9 && !spec.square;
    const head = top + (numbers ? 14 : 0);
    const out = [];
    if (first) spec.blocks.forEach((block, b) => {
      const x = left + (b + .5) * wide;
      out.push(wide > size + 4 ?
        `<text x="${x}" y="${top - 5}" text-anchor="middle">${escaped(block)}</text>` :
        `<text transform="translate(${x + 4},${top - 3}) rotate(-90)">${escaped(block)}</text>`);
      if (b) out.push(`<line x1="${left + b * wide}" x2="${left + b * wide}" y1="${top}" y2="${
        head + rows * height}" class="rule"/>`);
    });
    if (numbers) spec.columns.forEach((name, c) => out.push(
      `<text x="${left + (c + .5) * cell}" y="${head - 3}" text-anchor="middle" class="head" ` +
      `data-column="${c}">${escaped(spec.short[c])}</text>`));
    order.forEach((r, i) => {
      const y = head + i * height, label = escaped(short(spec.rows[r], characters));
      const text = `<text x="${left - 5}" y="${y + height - 3.5}" text-anchor="end">${label}</text>`;
      out.push(spec.links[r] ? `<a href="${spec.links[r]}">${text}</a>` : text);
      for (let c = 0; c < columns; c++) {
        const value = at(r, c), none = Number.isNaN(value);
        const strength = none ? 1 : spec.low < 0 ?
          Math.min(1, Math.abs(value) / Math.max(spec.high, -spec.low)) :
          (value - spec.low) / (spec.high - spec.low);
        out.push(`<rect class="cell ${none ? 'none' : value < 0 ? 'minus' : 'plus'}" data-i="${
          r * columns + c}" x="${(left + c * cell).toFixed(1)}" y="${y}" width="${
          (cell - .6).toFixed(1)}" height="${height - .6}" fill-opacity="${strength.toFixed(3)}"/>`);
        if (spec.marks.includes(r * columns + c)) out.push(`<circle class="mark" cx="${
          left + (c + .5) * cell}" cy="${y + height / 2}" r="1.8"/>`);
      }
      const before = i ? category(order[i - 1]) : null;
      if (names.length && category(r) !== before) {
        if (i && !spec.square) out.push(`<line x1="0" x2="${left + columns * cell}" y1="${y - .3}" y2="${
          y - .3}" class="rule"/>`);
        if (!narrow) out.push(`<text x="${left + columns * cell + 8}" y="${
          y + height - 3.5}" class="strong">${escaped(short(category(r), 22))}</text>`);
      }
    });
    const width = left + columns * cell + right;
    plot.innerHTML = `<svg role="img" aria-label="${escaped(spec.title)}" width="${width}" ` +
      `height="${head + rows * height + 4}">${out.join('')}</svg>`;
    figure.dataset.order = order.map(r => spec.rows[r]).join('\n');
  }
  explain(plot, i => {
    const r = Math.floor(i / columns), c = i % columns;
    const places = spec.groups.map(g => g[r]).filter(Boolean).join(' / ');
    return [spec.rows[r], ...(places ? [places] : []), `${spec.columns[c]}: ${spec.what} ${
      shown(at(r, c))}`, ...(spec.notes[i] ? [spec.notes[i]] : [])];
  });
  return draw;
}

// A row of dots for each label, one dot per series, with ranges where there are some.
function dots(figure, spec) {
  const plot = document.createElement('div');
  plot.className = 'scroll plot';
  figure.prepend(legend(spec.series), plot);
  const values = spec.series.flatMap(s => [...s.values, ...s.low, ...s.high])
    .filter(v => v !== null);
  const low = Math.min(0, ...values), high = Math.max(1, ...values);
  explain(plot, i => {
    const series = spec.series[Math.floor(i / spec.rows.length)], r = i % spec.rows.length;
    const between = series.low[r] === null || series.low[r] === undefined ? '' :
      ` (${shown(series.low[r])} to ${shown(series.high[r])})`;
    return [spec.rows[r], `${series.name}: ${shown(series.values[r])}${between}`];
  });
  return () => {
    const room = figure.clientWidth - 4, narrow = room < 600;
    const characters = Math.min(narrow ? 24 : 44, Math.max(...spec.rows.map(r => r.length)));
    const left = 6.2 * characters + 8, width = Math.max(120, Math.min(640, room - left - 16));
    const height = 15, bottom = spec.rows.length * height + 6;
    const x = v => left + 6 + (width - 12) * (v - low) / (high - low);
    const out = ticks(low, high, width / 70).map(t => `<line x1="${x(t)}" x2="${x(t)}" y1="0" y2="${
      bottom}" class="${t ? 'grid' : 'rule'}"/><text x="${x(t)}" y="${bottom + 13}" ` +
      `text-anchor="middle">${+t.toFixed(6)}</text>`);
    spec.rows.forEach((row, r) => {
      const y = r * height + height / 2 + 3, label = escaped(short(row, characters));
      const text = `<text x="${left - 5}" y="${y + 4}" text-anchor="end">${label}</text>`;
      out.push(spec.links[r] ? `<a href="${spec.links[r]}">${text}</a>` : text);
      const at = spec.series.map(series => series.values[r] === null ? NaN : x(series.values[r]));
      spec.series.forEach((series, s) => {
        if (series.values[r] === null) return;
        // A dot that later ones would hide is a ring around them.
        const above = at.slice(s + 1).filter(other => Math.abs(other - at[s]) < 3).length;
        if (series.low.length && series.low[r] !== null) out.push(`<line x1="${x(series.low[r])}" ` +
          `x2="${x(series.high[r])}" y1="${y + s}" y2="${y + s}" stroke="${paint(s)}" class="span"/>`);
        out.push(`<circle data-i="${s * spec.rows.length + r}" cx="${at[s]}" cy="${
          y + (series.low.length ? s : 0)}" r="${Math.min(4 + 1.5 * above, 7.5)}" fill="${
          paint(s)}"/>`);
      });
    });
    plot.innerHTML = `<svg role="img" aria-label="${escaped(spec.title)}" width="${
      left + width + 12}" height="${bottom + 18}">${out.join('')}</svg>`;
  };
}

function lines(figure, spec) {
  const plot = document.createElement('div');
  plot.className = 'scroll plot';
  figure.prepend(legend(spec.series), plot);
  const xs = spec.series.flatMap(s => s.x), ys = spec.series.flatMap(s => s.y);
  const ends = v => [Math.min(...v), Math.max(...v)];
  const [[x0, x1], [y0, y1]] = [ends(xs), ends(ys)];
  return () => {
    const left = 48, width = Math.min(620, figure.clientWidth - 8), height = 230;
    const x = v => left + 6 + (width - left - 20) * (v - x0) / (x1 - x0 || 1);
    const y = v => height - 24 - (height - 36) * (v - y0) / (y1 - y0 || 1);
    const out = [
      ...ticks(y0, y1, 5).map(t => `<line x1="${left}" x2="${width - 12}" y1="${y(t)}" y2="${y(t)}" ` +
        `class="grid"/><text x="${left - 4}" y="${y(t) + 4}" text-anchor="end">${+t.toFixed(6)}</text>`),
      ...ticks(x0, x1, width / 90).map(t =>
        `<text x="${x(t)}" y="${height - 6}" text-anchor="middle">${+t.toFixed(6)}</text>`),
      ...spec.series.map((s, i) => !s.x.length ? '' : s.x.length > 1 ?
        `<polyline fill="none" stroke="${paint(i)}" class="line" points="${
          s.x.map((v, k) => `${x(v).toFixed(1)},${y(s.y[k]).toFixed(1)}`).join(' ')}"/>` :
        `<circle cx="${x(s.x[0])}" cy="${y(s.y[0])}" r="4" fill="${paint(i)}"/>`),
    ];
    plot.innerHTML = `<svg role="img" aria-label="${escaped(spec.title)}" width="${width}" height="${
      height}">${out.join('')}</svg>`;
  };
}

function legend(series) {
  const element = document.createElement('div');
  element.className = 'legend';
  element.innerHTML = series.map((s, i) => s.x && !s.x.length ? '' :
    `<span><i style="background:${paint(i)}"></i>${escaped(s.name)}</span>`).join('');
  return element;
}

function ticks(low, high, most) {
  const span = high - low || 1, raw = span / Math.max(1, most), unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * unit).find(s => s >= raw * .999);
  const result = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) result.push(k * step);
  return result;
}

const kinds = {heatmap, dots, lines};
const redraw = [...document.querySelectorAll('figure[data-figure]')].map(figure => {
  const spec = figures[figure.dataset.figure];
  return kinds[spec.kind](figure, spec);
});
redraw.forEach(draw => draw());
let width = innerWidth;
addEventListener('resize', () => {
  if (innerWidth !== width) { width = innerWidth; redraw.forEach(draw => draw()); }
});
