// Runs once for each part of the page; `element` holds it, `trigger` calls Python.
const on = (name, action) => element.addEventListener(name, action)

// ---- the upload: a file, a drop, a paste or an example ----

function send(file) {
  if (!file) return
  const max = Number(element.querySelector('input[type=file]').dataset.max)
  if (file.size > max) return trigger('upload', { image: 'too large', names: '' })
  const reader = new FileReader()
  reader.onload = () => trigger('upload', { image: reader.result, names: '' })
  reader.readAsDataURL(file)
}

if (element.querySelector('.drop')) {
  on('change', event => { send(event.target.files[0]); event.target.value = '' })
  on('dragover', event => event.preventDefault())
  on('drop', event => { event.preventDefault(); send(event.dataTransfer.files[0]) })
  on('click', event => {
    const example = event.target.closest('button')
    if (example) trigger('upload', { image: example.firstChild.src, names: example.dataset.names })
  })
  document.addEventListener('paste', event => send(event.clipboardData.files[0]))
}

// ---- a result: label and score under the pointer, a click that teaches, the download of the drawing ----

function point(event) {
  const tip = element.querySelector('.tip')
  if (!tip) return
  const number = event.target.closest('[data-segment]')?.dataset.segment
  for (const part of element.querySelectorAll('[data-segment]')) part.classList.toggle('on', part.dataset.segment === number)
  const text = event.target.dataset.text
  tip.hidden = !text
  if (!text) return
  const canvas = tip.parentElement.getBoundingClientRect()
  tip.textContent = text
  tip.style.left = Math.min(event.clientX - canvas.left, canvas.width - tip.offsetWidth) + 'px'
  tip.style.top = Math.max(event.clientY - canvas.top - 36, 0) + 'px'
}
for (const name of ['pointermove', 'pointerdown', 'pointerleave', 'focusin']) on(name, point)
on('click', event => {
  const word = document.querySelector('#teach input, #teach textarea').value.trim()
  const number = event.target.closest('.view [data-segment]')?.dataset.segment
  if (word && number) trigger('select', { word, segment: number })
  const link = event.target.closest('a.image')
  if (link) link.href = element.querySelector('.canvas img').src
})
