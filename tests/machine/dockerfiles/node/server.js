require("http")
  .createServer((_, answer) => answer.end("42\n"))
  .listen(3000);
