// Added to smalldocs' own script when the site is built.

// Search: entries with every word of the query, an exact name first, then by kind (0 page or chapter, 1 function,
// 2 internal). Within a kind: what is named so, what has the query as it is, what has its words as (beginnings of)
// words, and what has them inside others, as `without` has `out`. Where no entry has every word, Fuse looks for what
// is spelt alike.
const wordly = s => s.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')
window.Fuse = class extends window.Fuse {
  constructor(entries, options) { super(entries, options); this.entries = entries }
  search(query, options) {
    const q = query.trim().toLowerCase(), words = q.split(/\s+/), hits = []
    const whole = new RegExp(`(?<![\\p{L}\\d_])${wordly(q)}(?![\\p{L}\\d_])`, 'u')
    const begin = words.map(w => new RegExp(`(?<![\\p{L}\\d_])${wordly(w)}`, 'u'))
    for (const item of this.entries) {
      const names = `${item.title} ${item.section}`.toLowerCase(), text = `${names} ${item.text.toLowerCase()}`
      if (!words.every(w => text.includes(w))) continue
      const exact = (item.section || item.title).toLowerCase() === q && item.kind < 2
      const named = words.every(w => names.includes(w))
      const within = named ? 0 : whole.test(text) ? 1 : begin.every(b => b.test(text)) ? 2 : 3
      hits.push({ item, rank: exact ? -1 : 4 * item.kind + within })
    }
    if (hits.length) return hits.sort((a, b) => a.rank - b.rank).slice(0, options.limit)
    return super.search(query, options).sort((a, b) => a.item.kind - b.item.kind)
  }
}

// A link into something folded opens it
const reveal = () => {
  const place = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)))
  if (!place) return
  const inside = place.querySelector(':scope > details') ?? place
  for (let e = inside; e; e = e.parentElement) if (e.tagName === 'DETAILS') e.open = true
  place.scrollIntoView()
}
addEventListener('hashchange', reveal)
reveal()
