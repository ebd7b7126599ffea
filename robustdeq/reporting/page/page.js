"use strict";
// The table library sorts and searches; this file opens rows and filters them.
(function () {
  const table = document.getElementById("rows");
  if (!table || !window.DataTable) return;
  document.documentElement.classList.add("scripted");
  const rows = new DataTable(table, {
    paging: false,
    order: [],
    autoWidth: false,
    layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
    columnDefs: [{ targets: "unsorted", orderable: false }],
  });
  const opened = new Map();
  const shown = document.getElementById("shown");
  const filters = Array.from(document.querySelectorAll("[data-filter]"));
  const search = document.getElementById("search");

  function matches(row, filter) {
    if (!filter.value) return true;
    const held = JSON.parse(row.dataset[filter.dataset.filter]);
    return held.includes(filter.value);
  }

  function count() {
    const found = rows.rows({ search: "applied" }).count();
    shown.textContent = found + " of " + rows.rows().count() + " rows shown";
  }

  rows.search.fixed("filters", function (text, data, index) {
    const row = rows.row(index).node();
    return filters.every((filter) => matches(row, filter));
  });

  function refresh() {
    rows.search(search.value).draw();
    count();
  }

  function shownColumns() {
    return Array.from(table.tHead.rows[0].cells).filter((cell) => cell.offsetParent !== null).length;
  }

  function fold(button) {
    const row = rows.row(button.closest("tr"));
    const home = document.getElementById(button.dataset.evidence);
    const evidence = opened.get(button) || home.querySelector(".evidence");
    opened.set(button, evidence);
    if (row.child.isShown()) {
      home.append(evidence);
      row.child.hide();
    } else {
      row.child(evidence).show();
      // Narrow screens hide columns, and a cell over hidden ones would widen the table.
      evidence.closest("td").colSpan = shownColumns();
    }
    button.setAttribute("aria-expanded", String(row.child.isShown()));
  }

  table.addEventListener("click", function (event) {
    const button = event.target.closest(".open");
    if (!button) return;
    event.preventDefault();
    fold(button);
  });

  // A link to a row's evidence opens it in its place.
  function follow() {
    const wanted = location.hash && document.getElementById(location.hash.slice(1) + "-button");
    if (!wanted) return;
    if (wanted.getAttribute("aria-expanded") !== "true") fold(wanted);
    wanted.scrollIntoView();
    wanted.focus();
  }

  filters.forEach((filter) => filter.addEventListener("change", refresh));
  search.addEventListener("input", refresh);
  document.getElementById("reset").addEventListener("click", function () {
    filters.forEach((filter) => { filter.value = ""; });
    search.value = "";
    refresh();
  });
  window.addEventListener("hashchange", follow);
  count();
  follow();
})();
