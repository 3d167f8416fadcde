"""Writes one HTML page about one model, with the scores of other runs beside it.

`inputs` reads run directories; `features`, `statistics` and `evaluation.gains` compute numbers;
`*_sections` choose what to say; `figures` and `page` turn it into data and HTML, which figures.js
and page.js bring to life in the browser; `build.report` does all of it in order.
"""
