// Sorts a table by the clicked column: numbers by value, text by letters, empty cells last.
document.querySelectorAll('th button').forEach(button => button.addEventListener('click', () => {
  const head = button.parentElement, body = head.closest('table').tBodies[0];
  const sign = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
  const key = row => row.cells[head.cellIndex].dataset.value;
  const number = head.classList.contains('number');
  head.parentElement.querySelectorAll('th').forEach(th => th.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
  [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === '' || y === '') return (x === '') - (y === '');
    return sign * (number ? x - y : x.localeCompare(y));
  }).forEach(row => body.append(row));
}));
// A link to a task opens its predictions.
const openTarget = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === 'DETAILS') { target.open = true; target.scrollIntoView(); }
};
addEventListener('hashchange', openTarget);
openTarget();
