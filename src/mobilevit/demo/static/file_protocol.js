// Browsers load no modules from file:// URLs. This classic script shows how to serve the page instead.
if (location.protocol === "file:") {
  const path = decodeURIComponent(new URL(".", location.href).pathname);
  const folder = path.replace(/^\/(?=[A-Za-z]:)/, "").replace(/(?<=.)\/$/, ""); // /C:/page/ -> C:/page
  document.getElementById("serve").textContent = `python -m http.server -b 127.0.0.1 -d "${folder}"`;
  const url = "http://127.0.0.1:8000/";
  document.getElementById("served").href = document.getElementById("served").textContent = url;
  document.getElementById("server").hidden = false;
}
