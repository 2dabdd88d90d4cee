'use strict';
// Draws one flight at a time: the scene in 3-D, time series beside it, one slider for both.

const flights = JSON.parse(document.getElementById('flights').textContent);
const AXES = ['#c2410c', '#15803d', '#1d4ed8'];  // x, y, z
const PHASES = {taking_off: '#dbeafe', holding: '#fef3c7', following: '#ecfdf3', landing: '#ede9fe',
                emergency: '#fecaca'};
const VERDICT = f => f.failed ? 'var(--red)' : f.verdict === 'success' ? 'var(--green)' :
                     f.mode === 'open_loop' ? 'var(--blue)' : 'var(--amber)';
const [SPHERES, NEAREST, GROUND, PATH, HORIZONS, PLAN, DRONE] = [0, 1, 2, 3, 4, 5, 6];  // traces of the scene
const $ = id => document.getElementById(id);
let current = null, playing = null, cursor = -1;

// Triangles of a unit sphere: rings of latitude, one mesh for all spheres of a field.
const BALL = (() => {
  const rings = 7, around = 12, points = [], faces = [];
  for (let i = 0; i <= rings; i++) for (let j = 0; j < around; j++) {
    const v = Math.PI * i / rings, u = 2 * Math.PI * j / around;
    points.push([Math.sin(v) * Math.cos(u), Math.sin(v) * Math.sin(u), Math.cos(v)]);
  }
  for (let i = 0; i < rings; i++) for (let j = 0; j < around; j++) {
    const a = i * around + j, b = i * around + (j + 1) % around;
    faces.push([a, b, a + around], [b, b + around, a + around]);
  }
  return {points, faces};
})();

function mesh(spheres, frame, wanted) {
  const x = [], y = [], z = [], i = [], j = [], k = [];
  spheres.radius.forEach((r, n) => {
    const c = spheres.centers[frame].slice(3 * n, 3 * n + 3);
    if (!wanted(n) || r === null || c.some(v => v === null)) return;
    const base = x.length;
    for (const p of BALL.points) { x.push(c[0] + r * p[0]); y.push(c[1] + r * p[1]); z.push(c[2] + r * p[2]); }
    for (const f of BALL.faces) { i.push(base + f[0]); j.push(base + f[1]); k.push(base + f[2]); }
  });
  return {x, y, z, i, j, k};
}

// Index of the last entry of the increasing list t that is not later than `at`; 0 before the first.
function latest(t, at) {
  let low = 0, high = t.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (t[middle] <= at) low = middle; else high = middle - 1;
  }
  return low;
}

function meshes(f, at) {
  if (!f.spheres.radius.length) return [{}, {}];
  const frame = latest(f.spheres.t, at);
  return [mesh(f.spheres, frame, n => n !== f.nearest), mesh(f.spheres, frame, n => n === f.nearest)];
}

function horizons(f) {  // a few plans at equal distances in time while following
  const x = [], y = [], z = [], chosen = f.plans.t.map((t, n) => n).filter(n => f.plans.t[n] >= 0);
  const step = Math.max(1, Math.floor(chosen.length / 12));
  for (let n = 0; n < chosen.length; n += step) {
    const [a, b, c] = f.plans.path[chosen[n]];
    x.push(...a, null); y.push(...b, null); z.push(...c, null);
  }
  return {x, y, z};
}

function drawScene(f) {
  const [field, near] = meshes(f, f.closest ?? 0), [x, y, z] = f.position;
  const flown = f.t.map((t, n) => t >= 0 && t <= f.end), part = (v, keep) => v.map((w, n) => flown[n] === keep ? w : null);
  const line = {type: 'scatter3d', mode: 'lines', hoverinfo: 'skip'};
  const solid = {type: 'mesh3d', flatshading: false, hoverinfo: 'skip', showlegend: true,
                 lighting: {ambient: 0.55, diffuse: 0.7, specular: 0.15}};
  const traces = [
    {...solid, ...field, color: '#94a3b8', opacity: 0.45, name: 'spheres'},
    {...solid, ...near, color: '#dc2626', opacity: 0.75, name: 'closest sphere'},
    {...line, x: part(x, false), y: part(y, false), z: part(z, false), name: 'take-off, way to the start, landing',
     line: {color: '#6b7280', width: 2, dash: 'dot'}},
    {...line, x: part(x, true), y: part(y, true), z: part(z, true), name: 'flown', hoverinfo: 'text',
     text: f.t.map((t, n) => `${t.toFixed(2)} s, ${f.speed[n]} m/s`),
     line: {color: f.speed.map(v => v ?? 0), colorscale: 'Viridis', width: 6, showscale: true,
            colorbar: {title: {text: 'm/s'}, len: 0.4, thickness: 10, x: 1.0, y: 0.25}}},
    {...line, ...horizons(f), name: 'planned horizons', line: {color: '#f59e0b', width: 2}, opacity: 0.5},
    {type: 'scatter3d', mode: 'lines+markers', x: [], y: [], z: [], name: 'plan now', hoverinfo: 'skip',
     line: {color: '#ea580c', width: 5}, marker: {size: 3, color: '#ea580c'}},
    {type: 'scatter3d', mode: 'markers', x: [], y: [], z: [], name: 'drone', hoverinfo: 'skip',
     marker: {size: 7, color: '#111827'}},
    {type: 'scatter3d', mode: 'markers', x: [f.goal[0]], y: [f.goal[1]], z: [f.goal[2]], name: 'goal',
     marker: {size: 8, symbol: 'diamond', color: '#16a34a'}},
  ];
  const axis = text => ({title: {text}, backgroundcolor: '#fafafa', gridcolor: '#e5e7eb', showbackground: true});
  Plotly.react('scene', traces, {
    margin: {l: 0, r: 0, t: 0, b: 0}, uirevision: f.label, legend: {x: 0, y: 0, bgcolor: 'rgba(255,255,255,.7)'},
    scene: {aspectmode: 'data', xaxis: axis('x (m)'), yaxis: axis('y (m)'), zaxis: axis('z (m)'),
            camera: {eye: {x: 0.85, y: -1.25, z: 0.6}}}}, {responsive: true, displaylogo: false});
}

const ROWS = [  // title of the row, then its curves: name, times, values, colour, as points
  ['position, goal dashed (m)', f => f.position.map((v, n) => ['xyz'[n], f.t, v, AXES[n]])],
  ['clearance to the nearest sphere (m)', f => f.spheres.radius.length ? [['clearance', f.t, f.clearance, '#1f2430']] : []],
  ['distance from the setpoint (cm)', f => [['setpoint error', ...f.tracking, '#1d4ed8']]],
  ['policy (ms)', f => [['odometry to plan', f.ticks.t, f.ticks.latency_ms, '#a16207', true],
                        ['solve', f.ticks.t, f.ticks.solve_ms, '#7c3aed', true]]],
  ['solver residual', f => [['residual', f.ticks.t, f.ticks.residual, '#0f766e', true]]],
  ['solver steps', f => [['steps', f.ticks.t, f.ticks.iterations, '#be185d', true]]],
];

function drawSeries(f) {
  const traces = [], layout = {
    margin: {l: 44, r: 8, t: 20, b: 34}, showlegend: false, hovermode: 'x unified', shapes: [], annotations: [],
    xaxis: {title: {text: f.mode === 'trial' ? 'time after engage (s)' : 'time (s)'}, range: [f.t[0], f.t.at(-1)],
            anchor: `y${ROWS.length}`, gridcolor: '#e5e7eb'}};
  const height = 1 / ROWS.length;
  ROWS.forEach(([title, curves], n) => {
    const name = n ? `y${n + 1}` : 'y', top = 1 - n * height;
    layout[n ? `yaxis${n + 1}` : 'yaxis'] = {
      domain: [top - 0.74 * height, top - 0.02], gridcolor: '#e5e7eb', zeroline: false, nticks: 5,
      type: title === 'solver residual' ? 'log' : 'linear', exponentformat: 'e'};
    const drawn = curves(f);
    layout.annotations.push({text: `<b>${title}</b>` + (drawn.length ? '' : ': not in the bag'), xref: 'paper',
      yref: 'paper', x: 0, y: top - 0.02, xanchor: 'left', yanchor: 'bottom', showarrow: false, font: {size: 12}});
    for (const [label, x, y, color, points] of drawn)
      traces.push({type: 'scatter', x, y, yaxis: name, name: label, mode: points ? 'markers' : 'lines',
                   line: {color, width: 1.4}, marker: {color, size: 3.5}});
  });
  f.goal.forEach((g, n) => layout.shapes.push({type: 'line', xref: 'paper', x0: 0, x1: 1, yref: 'y', y0: g, y1: g,
    line: {color: AXES[n], width: 1, dash: 'dash'}, opacity: 0.6}));
  for (const [phase, from, to] of f.phases) if (PHASES[phase])
    layout.shapes.push({type: 'rect', layer: 'below', yref: 'paper', y0: 0, y1: 1, x0: from, x1: to,
      fillcolor: PHASES[phase], line: {width: 0}});
  for (const [t] of [...f.events, ...(f.failure === null ? [] : [[f.failure]])])
    layout.shapes.push({type: 'line', yref: 'paper', y0: 0, y1: 1, x0: t, x1: t, line: {color: '#dc2626', width: 1.2}});
  for (const [t, why] of f.ticks.refused)
    layout.annotations.push({x: t, y: 0, yref: 'y4', text: '✕', showarrow: false, hovertext: why,
                             font: {color: '#dc2626', size: 11}});
  cursor = layout.shapes.push({type: 'line', yref: 'paper', y0: 0, y1: 1, x0: 0, x1: 0,
                               line: {color: '#111827', width: 1}}) - 1;
  Plotly.react('series', traces, layout, {responsive: true, displaylogo: false});
}

function drawTimeLine(f) {
  const from = f.t[0], span = f.t.at(-1) - from, percent = t => `${100 * (t - from) / span}%`;
  const part = (tag, style, title) => Object.assign(document.createElement(tag), {title, style});
  const line = $('phases');
  line.replaceChildren(...f.phases.map(([phase, a, b]) => part('span', `position:absolute;top:0;bottom:0;left:${
    percent(a)};width:${100 * (b - a) / span}%;background:${PHASES[phase] ?? '#f1f5f9'}`,
    `${phase.replace('_', ' ')}, ${a} to ${b} s`)),
    ...f.events.map(([t, guard, why]) => part('span', `position:absolute;top:0;bottom:0;left:${percent(t)
      };width:3px;background:#dc2626`, `${t} s: ${guard}: ${why}`)));
  $('events').replaceChildren(...f.events.map(([t, guard, why]) => Object.assign(document.createElement('p'),
    {textContent: `${t.toFixed(2)} s  ${guard}: ${why}`, className: 'note'})));
}

function goTo(t) {
  const f = current, n = latest(f.t, t), update = {x: [], y: [], z: []}, traces = [];
  const put = (trace, x, y, z) => { traces.push(trace); update.x.push(x); update.y.push(y); update.z.push(z); };
  put(DRONE, [f.position[0][n]], [f.position[1][n]], [f.position[2][n]]);
  if (f.plans.t.length) put(PLAN, ...f.plans.path[latest(f.plans.t, t)]);
  if (f.spheres.t.length > 1)
    meshes(f, t).forEach((m, k) => { if (m.x) put(k ? NEAREST : SPHERES, m.x, m.y, m.z); });
  Plotly.restyle('scene', update, traces);
  Plotly.relayout('series', {[`shapes[${cursor}].x0`]: t, [`shapes[${cursor}].x1`]: t});
  $('time').value = t;
  const phase = f.phases.find(([, a, b]) => t >= a && t < b);
  $('clock').textContent = `${t.toFixed(2)} s` + (phase ? `, ${phase[0].replace('_', ' ')}` : '');
}

function show(index) {
  const f = current = flights[index];
  play(false);
  document.querySelectorAll('tr.pick').forEach(row => row.classList.toggle('chosen', row.dataset.flight == index));
  $('name').textContent = f.metadata.policy ? `${f.label}, ${f.metadata.policy}` : f.label;
  $('verdict').textContent = f.verdict;
  $('verdict').style.color = VERDICT(f);
  $('remarks').textContent = f.remarks.join('\n');
  $('metadata').textContent = Object.entries(f.metadata).map(([k, v]) => `${k} = ${v}`).join(', ');
  $('time').min = f.t[0]; $('time').max = f.t.at(-1);
  drawScene(f); drawSeries(f); drawTimeLine(f);
  goTo(Math.max(0, f.t[0]));
  document.body.dataset.shown = index;
}

function play(on) {
  clearInterval(playing); playing = null;
  $('play').textContent = on ? 'pause' : 'play';
  if (!on) return;
  const end = current.t.at(-1), from = +$('time').value >= end - 0.05 ? current.t[0] : +$('time').value;
  const began = performance.now(), speed = +$('speed').value;
  playing = setInterval(() => {
    const t = from + speed * (performance.now() - began) / 1000;
    if (t >= end) play(false);
    goTo(Math.min(t, end));
  }, 60);
}

function record() {  // what the scene shows while it plays, as a video file
  const canvas = $('scene').querySelector('canvas'), parts = [];
  const recorder = new MediaRecorder(canvas.captureStream(20), {mimeType: 'video/webm'});
  recorder.ondataavailable = event => parts.push(event.data);
  recorder.onstop = () => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob(parts, {type: 'video/webm'}));
    link.download = `${current.label.replaceAll('/', '_')}.webm`;
    link.click();
  };
  goTo(current.t[0]); recorder.start(); play(true);
  const done = setInterval(() => { if (playing === null) { clearInterval(done); recorder.stop(); } }, 100);
}

document.querySelectorAll('tr.pick').forEach(row => row.addEventListener('click', () => show(+row.dataset.flight)));
$('play').addEventListener('click', () => play(playing === null));
$('record').addEventListener('click', record);
$('time').addEventListener('input', () => { play(false); goTo(+$('time').value); });
if (flights.length) {
  show(0);
  $('series').on('plotly_click', event => { play(false); goTo(event.points[0].x); });
}
// One line for whoever watches the console: what was drawn.
const drawn = id => $(id).data?.filter(trace => trace.x?.length).length ?? 0;
console.log(`flight report: ${flights.length} flights, ${drawn('scene')} traces in the scene, ${drawn('series')} curves`);
