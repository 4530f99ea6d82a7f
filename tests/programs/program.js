const { spawn, execSync, spawnSync } = require('child_process');
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const crypto = require('crypto'), fs = require('fs'), http = require('http'), net = require('net'), os = require('os');
const zlib = require('zlib');

if (!isMainThread) {
  parentPort.postMessage(workerData * 2);
} else {
  (async () => {
    console.log(await Promise.all([1, 2, 3].map(n => new Promise(done =>
      new Worker(__filename, { workerData: n }).on('message', done)))));
    const server = http.createServer((q, r) => r.end('you asked ' + q.url));
    await new Promise(done => server.listen(0, '127.0.0.1', done));
    const text = await new Promise(done => http.get({ port: server.address().port, host: '127.0.0.1', path: '/x', agent: false },
      r => { let t = ''; r.on('data', d => t += d).on('end', () => done(t)); }));
    console.log(text);
    await new Promise(done => server.close(done));
    const c = spawn('sort', ['-r']);
    c.stdin.end('a\nb\n');
    c.stdout.on('data', d => process.stdout.write(d));
    console.log(await new Promise(done => c.on('close', done)));
    console.log(execSync('echo sync').toString().trim(), spawnSync('sh', ['-c', 'exit 4']).status);
    await fs.promises.writeFile('node.txt', 'x'.repeat(100000));
    console.log((await fs.promises.stat('node.txt')).size, fs.readdirSync('.').length);
    console.log(zlib.gunzipSync(zlib.gzipSync('zipped')).toString());
    console.log(await new Promise(done => crypto.pbkdf2('a', 'b', 1000, 8, 'sha256', (e, k) => done(k.toString('hex')))));
    process.on('SIGUSR2', () => console.log('usr2'));
    process.kill(process.pid, 'SIGUSR2');
    await new Promise(done => setTimeout(done, 50));
    const watch = fs.watch('.', () => { watch.close(); });
    fs.writeFileSync('watched', '');
    await new Promise(done => watch.on('close', done));
    setImmediate(() => { console.log('immediate'); process.exitCode = 9; });
  })();
}
