// A globe on a canvas: land, borders, cities and marks of the page, from the whole Earth down to a few meters.
// Places are [latitude, longitude] in degrees; directions are unit vectors [x, y, z], as in geo/distance.py.

export const EARTH_KM = 6371;
const RADIANS = Math.PI / 180;
// Land is drawn only inside a circle around the middle of the view, with at least this angular radius. Every such circle
// on land crosses a coast. A circle that crosses no coast is therefore in the sea.
const CUT = 30 * RADIANS;
// Height of the controls that cover the bottom of the canvas, in pixels.
const FOOT = 110;
// Angular radius of small coast rings. Their points outside the circle are moved onto it, instead of cutting the ring.
const SMALL = 3 * RADIANS;

const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const unit = a => { const n = Math.hypot(...a); return a.map(x => x / n); };
const mix = (a, b, t) => a.map((x, k) => x + (b[k] - x) * t);

export function direction([latitude, longitude]) {
  const phi = latitude * RADIANS, theta = longitude * RADIANS;
  return [Math.cos(phi) * Math.cos(theta), Math.cos(phi) * Math.sin(theta), Math.sin(phi)];
}
export function place([x, y, z]) {
  return [Math.atan2(z, Math.hypot(x, y)) / RADIANS, Math.atan2(y, x) / RADIANS];
}
// The angle between two directions. It is precise for small angles too, unlike the arc cosine.
export function angle(a, b) {
  return Math.atan2(Math.hypot(...cross(a, b)), dot(a, b));
}
export const kilometers = (a, b) => angle(direction(a), direction(b)) * EARTH_KM;
export const middle = places => place(unit(places.map(direction).reduce((a, b) => a.map((x, k) => x + b[k]))));

// Points along the great circle from one direction to another, with the first direction and without the second.
function arc(a, b) {
  const whole = angle(a, b), steps = Math.max(1, Math.ceil(whole / (2 * RADIANS)));
  return Array.from({length: steps}, (_, k) => unit(mix(a, b, k / steps)));
}

function outline(corners) {
  const points = corners.map(direction);
  return points.flatMap((a, k) => arc(a, points[(k + 1) % points.length]));
}

function circle(center, radius, steps = 120) {
  const up = direction(center), east = unit(Math.abs(up[2]) > 0.999 ? cross([0, 1, 0], up) : cross([0, 0, 1], up));
  const north = cross(up, east), [c, s] = [Math.cos(radius), Math.sin(radius)];
  return Array.from({length: steps}, (_, k) => {
    const t = k / steps * 2 * Math.PI;
    return up.map((x, i) => c * x + s * (Math.cos(t) * north[i] + Math.sin(t) * east[i]));
  });
}

export class Globe {
  // colors: function that returns CSS colors by name. covered: function that returns the boxes, [left, top, right,
  // bottom], of elements that would hide labels.
  constructor(canvas, colors, covered) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.colors = colors;
    this.covered = covered;
    this.center = [20, 10];
    this.radius = 0;  // radius of the Earth, in CSS pixels; 0 until the canvas has a size
    this.marks = {cells: [], circles: [], dots: [], lines: []};
    this.world = {land: [], borders: [], cities: []};
    this.flight = 0;
    new ResizeObserver(() => this.resize()).observe(canvas);
    this.listen();
  }

  // Views use only the part of the canvas above the controls.
  get room() { return Math.min(this.width, this.height - FOOT); }
  get whole() { return 0.46 * this.room; }
  get finest() { return EARTH_KM / 0.02 * this.whole; }

  // The arguments are world.json and cities.json.
  load({unit: step, land, borders}, {unit: part, countries, cities}) {
    const decode = moves => {
      const points = [];
      for (let k = 0, x = 0, y = 0; k < moves.length; k += 2) points.push(direction([(y += moves[k + 1]) * step, (x += moves[k]) * step]));
      const heart = unit(points.reduce((a, b) => a.map((v, i) => v + b[i])));
      return {points, heart, reach: Math.max(...points.map(p => angle(heart, p)))};
    };
    this.world = {
      land: land.map(decode), borders: borders.map(decode),
      cities: cities.map(([name, code, x, y]) => ({name, country: countries[code], at: [y * part, x * part], up: direction([y * part, x * part])})),
    };
    this.redraw();
  }

  // The nearest city, and its distance in kilometers.
  city(at) {
    const up = direction(at);
    let best = null, most = -1;
    for (const city of this.world.cities) { const near = dot(city.up, up); if (near > most) { most = near; best = city; } }
    return best && {name: best.name, country: best.country, km: kilometers(best.at, at)};
  }

  mark(marks) { Object.assign(this.marks, marks); this.redraw(); }

  resize() {
    const {clientWidth, clientHeight} = this.canvas, ratio = window.devicePixelRatio || 1;
    const fits = !this.radius || Math.abs(this.radius - this.whole) < 1;
    [this.width, this.height] = [clientWidth, clientHeight];
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (fits) this.radius = this.whole;
    this.draw();
  }

  redraw() {
    if (!this.asked) this.asked = requestAnimationFrame(() => { this.asked = 0; this.draw(); });
  }

  // A view around a place. km: width of the smaller side of the canvas, on the ground.
  view(center, km) {
    return {center, radius: Math.max(this.whole, Math.min(this.finest, EARTH_KM / km * this.room))};
  }

  // Moves to a view. The result is false if another move began before the arrival. Long moves zoom out on the way.
  fly({center, radius}, milliseconds) {
    const flight = ++this.flight, [from, to] = [direction(this.center), direction(center)], start = this.radius;
    const way = angle(from, to), far = Math.min(start, radius, Math.max(this.whole, 1.2 * this.room / way));
    const dip = Math.max(0, Math.log(Math.min(start, radius) / far));
    const axis = way > 3.1 ? unit(cross(from, [0, 0, 1])) : null;
    return new Promise(done => {
      const begun = performance.now();
      const step = now => {
        if (flight !== this.flight) return done(false);
        const t = milliseconds ? Math.min(1, (now - begun) / milliseconds) : 1, e = t < 0.5 ? 4 * t ** 3 : 1 - (2 - 2 * t) ** 3 / 2;
        const [a, b] = way < 1e-12 ? [1 - e, e] : [Math.sin((1 - e) * way) / Math.sin(way), Math.sin(e * way) / Math.sin(way)];
        this.center = t === 1 ? center : place(unit(axis ? mix(from, axis, e) : from.map((x, k) => a * x + b * to[k])));
        this.radius = t === 1 ? radius : Math.exp(Math.log(start) * (1 - e) + Math.log(radius) * e - 4 * e * (1 - e) * dip);
        this.draw();
        if (t === 1) done(true); else requestAnimationFrame(step);
      };
      if (milliseconds) requestAnimationFrame(step); else step(begun);
    });
  }

  move(right, down) {
    this.flight++;
    const [latitude, longitude] = this.center, degrees = 1 / this.radius / RADIANS;
    const east = right * degrees / Math.max(0.15, Math.cos(latitude * RADIANS));
    this.center = [Math.max(-89, Math.min(89, latitude - down * degrees)), (longitude + east + 540) % 360 - 180];
    this.redraw();
  }

  zoom(factor) {
    this.flight++;
    this.radius = Math.max(this.whole, Math.min(this.finest, this.radius * factor));
    this.redraw();
  }

  listen() {
    const {canvas} = this, pointers = new Map();
    const spread = () => { const [a, b] = [...pointers.values()]; return Math.hypot(a[0] - b[0], a[1] - b[1]); };
    canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); pointers.set(event.pointerId, [event.clientX, event.clientY]); });
    canvas.addEventListener("pointermove", event => {
      const last = pointers.get(event.pointerId);
      if (!last) return;
      const before = pointers.size === 2 ? spread() : 0;
      pointers.set(event.pointerId, [event.clientX, event.clientY]);
      if (before) this.zoom(spread() / before);
      this.move((last[0] - event.clientX) / pointers.size, (last[1] - event.clientY) / pointers.size);
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, event => pointers.delete(event.pointerId));
    // If the globe is almost as wide as the page, the mouse wheel scrolls the page instead of zooming.
    const free = () => canvas.clientWidth < 0.8 * document.documentElement.clientWidth;
    canvas.addEventListener("wheel", event => { if (!free() && !event.ctrlKey) return; event.preventDefault(); this.zoom(Math.exp(-event.deltaY / 300)); }, {passive: false});
    const keys = {ArrowLeft: [-60, 0], ArrowRight: [60, 0], ArrowUp: [0, -60], ArrowDown: [0, 60]};
    canvas.addEventListener("keydown", event => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (keys[event.key]) this.move(...keys[event.key]);
      else if (event.key === "+" || event.key === "=") this.zoom(1.5);
      else if (event.key === "-") this.zoom(1 / 1.5);
      else return;
      event.preventDefault();
    });
  }

  // The position [x, y, z] of a direction: x and y on the canvas, z towards the viewer and negative behind the Earth.
  project(p) {
    return [this.x + this.radius * dot(p, this.east), this.y - this.radius * dot(p, this.north), dot(p, this.up)];
  }

  draw() {
    if (!this.width || !this.height) return;
    const c = this.context, color = this.colors();
    this.up = direction(this.center);
    this.east = unit(cross([0, 0, 1], this.up));
    this.north = cross(this.up, this.east);
    [this.x, this.y] = [this.width / 2, (this.height - FOOT) / 2];
    this.away = Math.asin(Math.min(1, Math.hypot(this.width, this.height + FOOT) / 2 / this.radius));  // angular radius of the view
    c.clearRect(0, 0, this.width, this.height);
    this.drawSea(c, color);
    c.save();
    c.beginPath();
    c.arc(this.x, this.y, this.radius, 0, 2 * Math.PI);
    c.clip();
    this.drawLand(c, color);
    this.drawGraticule(c, color);
    this.drawLines(c, this.world.borders, color.border, 1);
    this.marks.cells.forEach(cell => this.drawCell(c, color, cell));
    this.marks.circles.forEach(mark => this.drawCircle(c, color, mark));
    this.marks.lines.forEach(mark => this.drawLine(c, color, mark));
    c.restore();
    const taken = this.drawDots(c, color);
    this.drawCities(c, color, taken);
    this.drawScale(c, color);
  }

  drawSea(c, color) {
    const {x, y, radius} = this;
    if (radius < 1.5 * Math.max(this.width, this.height)) {
      const glow = c.createRadialGradient(x, y, radius * 0.98, x, y, radius * 1.09);
      glow.addColorStop(0, color.glow);
      glow.addColorStop(1, color.clear);
      c.fillStyle = glow;
      c.beginPath();
      c.arc(x, y, radius * 1.09, 0, 2 * Math.PI);
      c.fill();
      const sea = c.createRadialGradient(x - radius * 0.35, y - radius * 0.4, radius * 0.1, x, y, radius);
      sea.addColorStop(0, color.sea);
      sea.addColorStop(1, color.deep);
      c.fillStyle = sea;
      c.beginPath();
      c.arc(x, y, radius, 0, 2 * Math.PI);
      c.fill();
    } else {
      c.fillStyle = color.sea;
      c.fillRect(0, 0, this.width, this.height);
    }
  }

  // Fills land by the winding of the coast rings, which have land on their left. A ring that leaves the circle follows
  // the circle counterclockwise to the point at which it enters again. These arcs together can go around the circle more
  // than once. Their whole turns are canceled by circles in the other direction.
  drawLand(c, color) {
    const cut = Math.max(CUT, Math.min(Math.PI / 2, this.away * 1.05)), least = Math.cos(cut), rim = this.radius * Math.sin(cut);
    const on = ([x, y]) => Math.atan2(this.y - y, x - this.x), TURN = 2 * Math.PI;
    let turned = 0;
    c.beginPath();
    for (const {points, heart, reach} of this.world.land) {
      if (angle(heart, this.up) > cut + reach) continue;
      if (reach < SMALL) {
        if (angle(heart, this.up) > this.away + reach) continue;
        points.forEach((p, k) => {
          let [x, y, z] = this.project(p);
          if (z < least) { const at = on([x, y]); x = this.x + rim * Math.cos(at); y = this.y - rim * Math.sin(at); }
          if (k) c.lineTo(x, y); else c.moveTo(x, y);
        });
        c.closePath();
        continue;
      }
      const seen = points.map(p => this.project(p)), first = seen.findIndex((p, k) => p[2] >= least && seen.at(k - 1)[2] < least);
      if (first < 0 && seen[0][2] < least) continue;
      let left = null, begun = null;
      for (let n = 0, k = Math.max(first, 0); n <= seen.length; n++, k = (k + 1) % seen.length) {
        const p = seen[k], before = seen.at(k - 1), inside = p[2] >= least, was = before[2] >= least;
        const edge = inside === was ? null : on(mix(before, p, (least - before[2]) / (p[2] - before[2])));
        if (inside && !was) {
          if (begun === null) { begun = edge; c.moveTo(this.x + rim * Math.cos(edge), this.y - rim * Math.sin(edge)); }
          else {
            const to = left + ((edge - left) % TURN + TURN) % TURN;
            turned += to - left;
            c.arc(this.x, this.y, rim, -left, -to, true);
          }
        }
        if (n === seen.length) break;
        if (!inside && was) { left = edge; c.lineTo(this.x + rim * Math.cos(edge), this.y - rim * Math.sin(edge)); }
        else if (inside && begun === null && n === 0) c.moveTo(p[0], p[1]);
        else if (inside) c.lineTo(p[0], p[1]);
      }
      c.closePath();
    }
    for (let k = Math.floor(turned / TURN); k > 0; k--) { c.moveTo(this.x + rim, this.y); c.arc(this.x, this.y, rim, 0, TURN); c.closePath(); }
    c.fillStyle = color.land;
    c.fill("nonzero");
    this.drawLines(c, this.world.land, color.coast, 1, true);
  }

  drawLines(c, lines, style, width, closed = false) {
    c.beginPath();
    for (const {points, heart, reach} of lines) {
      if (angle(heart, this.up) > this.away + reach) continue;
      this.trace(c, points, closed);
    }
    c.strokeStyle = style;
    c.lineWidth = width;
    c.stroke();
  }

  // Adds the visible parts of a line to the path. The result is true if all of the line is on the visible side.
  trace(c, points, closed) {
    let drawing = false, all = true;
    const many = points.length + (closed ? 1 : 0);
    for (let k = 0; k < many; k++) {
      const [x, y, z] = this.project(points[k % points.length]);
      if (z < 0) { drawing = all = false; continue; }
      if (drawing) c.lineTo(x, y); else c.moveTo(x, y);
      drawing = true;
    }
    return all;
  }

  drawGraticule(c, color) {
    const span = Math.min(Math.PI / 2, this.away) / RADIANS, step = [30, 15, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001].find(d => span / d > 2.4) || 0.001;
    const [latitude, longitude] = this.center, wide = Math.min(180, span / Math.max(0.1, Math.cos(Math.min(85, Math.abs(latitude) + span) * RADIANS)));
    const [south, north] = [Math.max(-90, latitude - span), Math.min(90, latitude + span)];
    const line = (from, to, at) => Array.from({length: 49}, (_, k) => direction(at(from + (to - from) * k / 48)));
    c.beginPath();
    for (let k = Math.ceil((longitude - wide) / step); k * step <= longitude + wide; k++) this.trace(c, line(south, north, l => [l, k * step]), false);
    for (let k = Math.ceil(south / step); k * step <= north; k++) this.trace(c, line(longitude - wide, longitude + wide, l => [k * step, l]), false);
    c.strokeStyle = color.graticule;
    c.lineWidth = 1;
    c.stroke();
  }

  drawCell(c, color, {corners, fill, width, label}) {
    const points = outline(corners);
    c.beginPath();
    const all = this.trace(c, points, true);
    if (fill && all) { c.globalAlpha = fill; c.fillStyle = color.cell; c.fill(); c.globalAlpha = 1; }
    c.strokeStyle = color.cell;
    c.lineWidth = width;
    c.lineJoin = "round";
    c.globalAlpha = width > 1.5 ? 1 : 0.55;
    c.stroke();
    c.globalAlpha = 1;
    if (!label) return;
    const [a, b] = corners.map(corner => this.project(direction(corner))).sort((a, b) => b[1] - a[1]);  // the lower edge
    const [x, y, z] = mix(mix(a, b, 0.5), this.project(direction(middle(corners))), 0.3);
    if (z > 0.1) this.text(c, color, label, x, y, "center", "600 15px system-ui, sans-serif", color.text);
  }

  drawCircle(c, color, {at, km, dash, label}) {
    if (km > EARTH_KM * 3) return;
    const points = circle(at, km / EARTH_KM);
    c.beginPath();
    const all = this.trace(c, points, true);
    if (all) { c.globalAlpha = 0.1; c.fillStyle = color.answer; c.fill(); c.globalAlpha = 1; }
    c.setLineDash(dash || []);
    c.strokeStyle = color.answer;
    c.lineWidth = 2;
    c.stroke();
    c.setLineDash([]);
    const [x, y, z] = this.project(points[0]);
    if (z > 0) this.text(c, color, label, x, y, "center", "600 13px system-ui, sans-serif", color.answer);
  }

  drawLine(c, color, {from, to, kind}) {
    c.beginPath();
    this.trace(c, [...arc(direction(from), direction(to)), direction(to)], false);
    c.setLineDash([2, 5]);
    c.lineCap = "round";
    c.strokeStyle = color[kind];
    c.lineWidth = 2;
    c.stroke();
    c.setLineDash([]);
  }

  drawDots(c, color) {
    const taken = this.covered();
    for (const {at, kind, size, label, ring} of this.marks.dots) {
      const [x, y, z] = this.project(direction(at));
      if (z < 0 || x < -20 || y < -20 || x > this.width + 20 || y > this.height + 20) continue;
      c.beginPath();
      c.arc(x, y, size, 0, 2 * Math.PI);
      c.fillStyle = color[kind];
      c.strokeStyle = color.halo;
      c.lineWidth = 2;
      c.fill();
      c.stroke();
      if (ring) { c.beginPath(); c.arc(x, y, size + 5, 0, 2 * Math.PI); c.strokeStyle = color[kind]; c.stroke(); }
      taken.push([x - size - 4, y - size - 4, x + size + 4, y + size + 4]);
      if (label) this.text(c, color, label, x, y, "center", `700 ${Math.round(size * 1.35)}px system-ui, sans-serif`, color.halo, false);
    }
    return taken;
  }

  drawCities(c, color, taken) {
    if (this.away > 1.2) return;
    const seen = Math.cos(Math.min(1.3, this.away)), font = "500 12px system-ui, sans-serif";
    let count = 0;
    c.font = font;
    for (const {name, up} of this.world.cities) {
      if (dot(up, this.up) < seen) continue;
      const [x, y] = this.project(up), box = [x - 4, y - 9, x + 10 + c.measureText(name).width, y + 9];
      if (x < 4 || y < 10 || box[2] > this.width - 4 || y > this.height - 10) continue;
      if (taken.some(other => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) continue;
      taken.push(box);
      c.beginPath();
      c.arc(x, y, 2, 0, 2 * Math.PI);
      c.fillStyle = color.city;
      c.fill();
      this.text(c, color, name, x + 6, y, "left", font, color.city);
      if (++count === 18) return;
    }
  }

  drawScale(c, color) {
    const perPixel = EARTH_KM / this.radius;
    if (this.radius < 1.6 * this.whole) return;
    const most = 110 * perPixel, power = 10 ** Math.floor(Math.log10(most)), km = [5, 2, 1].map(n => n * power).find(n => n <= most);
    const wide = km / perPixel, [x, y] = [this.width - 16, 22];
    c.beginPath();
    c.moveTo(x - wide, y - 5); c.lineTo(x - wide, y); c.lineTo(x, y); c.lineTo(x, y - 5);
    c.strokeStyle = color.text;
    c.lineWidth = 1.5;
    c.stroke();
    this.text(c, color, km < 1 ? `${Math.round(km * 1000)} m` : `${km.toLocaleString("en")} km`, x, y + 12, "right", "500 12px system-ui, sans-serif", color.text);
  }

  text(c, color, words, x, y, align, font, style, halo = true) {
    c.font = font;
    c.textAlign = align;
    c.textBaseline = "middle";
    if (halo) { c.lineWidth = 3.5; c.lineJoin = "round"; c.strokeStyle = color.halo; c.strokeText(words, x, y); }
    c.fillStyle = style;
    c.fillText(words, x, y);
  }
}
