// Added to smalldocs' own script when the site is built.

// Search: entries with every word of the query, an exact name first, then by kind (0 page or chapter, 1 function,
// 2 internal), within a kind what is named so before what only mentions it. Where no entry has every word, Fuse
// looks for what is spelt alike.
window.Fuse = class extends window.Fuse {
  constructor(entries, options) { super(entries, options); this.entries = entries }
  search(query, options) {
    const q = query.toLowerCase(), words = q.split(/\s+/), hits = []
    for (const item of this.entries) {
      const names = `${item.title} ${item.section}`.toLowerCase(), text = `${names} ${item.text.toLowerCase()}`
      if (!words.every(w => text.includes(w))) continue
      const exact = (item.section || item.title).toLowerCase() === q && item.kind < 2
      hits.push({ item, rank: exact ? -1 : 2 * item.kind + !words.every(w => names.includes(w)) })
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
