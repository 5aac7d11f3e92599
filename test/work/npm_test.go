package work

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"
)

// npm installs a project's packages here, as its developer would.
func npm(s *site, files map[string]string) (dir string) {
	s.t.Helper()
	dir = s.write(files)
	s.run(dir, "npm", "install", "--no-audit", "--no-fund")
	return dir
}

// vite copies a project in with all its packages, and works on its development server in
// a browser, through TLS, in a frame of another site. What is changed shows at once.
func vite(s *site) {
	dir := npm(s, map[string]string{
		"package.json": `{"private": true, "type": "module", "scripts": {"dev": "vite"}, "devDependencies": {"vite": "6.4.1"}}`,
		"index.html":   `<!doctype html><div id="app">it does not run</div><script type="module" src="/main.js"></script>`,
		"main.js": `import { text } from './text.js'
const show = (text) => { document.getElementById('app').textContent = text; parent.postMessage(text, '*') }
show(text)
import.meta.hot.accept('./text.js', (changed) => show(changed.text))`,
		"text.js": `export const text = 'as it was'`,
	})
	id := s.capsule("1024")
	s.nestbox("cp", "-r", dir, id+":/root")
	s.nestbox("exec", "-d", "--tag", "dev", "-w", "/root/project", id, "--", "npm", "run", "dev", "--", "--port", "5173", "--strictPort")
	url := s.nestbox("url", id, "5173")
	status, body := s.ask(url)
	require.Equal(s.t, http.StatusForbidden, status, "Vite refuses names that it does not know: %s", body)
	s.nestbox("port", "set", id, "5173", "--rewrite-host")
	status, body = s.ask(url)
	require.Equal(s.t, http.StatusOK, status, body)

	outer := s.elsewhere(`<!doctype html><title>nothing</title><script>onmessage = (e) => { document.title = e.data }</script><iframe src="` + url + `"></iframe>`)
	browser := s.browser()
	require.NoError(s.t, chromedp.Do(browser, chromedp.Navigate(outer)))
	titled := func(want string) {
		s.t.Helper()
		require.Eventually(s.t, func() bool {
			title, err := chromedp.Run(browser, chromedp.Title())
			return err == nil && title == want
		}, patience, 100*time.Millisecond, "the page in the frame does not say %q", want)
	}
	titled("as it was")
	s.nestbox("exec", id, "--", "sh", "-c", `echo "export const text = 'as it is'" > /root/project/text.js`)
	titled("as it is")
	require.NoError(s.t, chromedp.Do(browser, chromedp.Navigate(url)))
	require.Eventually(s.t, func() bool {
		text, err := chromedp.Run(browser, chromedp.Text("#app"))
		return err == nil && text == "as it is"
	}, patience, 100*time.Millisecond)
	address, err := chromedp.Run(browser, chromedp.Location())
	require.NoError(s.t, err)
	require.NotContains(s.t, address, "token", "the address that is shown lets nobody in")
}

// elsewhere serves a page of another site, and returns its address.
func (s *site) elsewhere(page string) (url string) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, page) }))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{s.cert}}
	server.StartTLS()
	s.t.Cleanup(server.Close)
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	require.NoError(s.t, err)
	return "https://" + net.JoinHostPort(elsewhere, port) + "/"
}

// browser starts one that trusts the site, and that blocks cookies of other sites than
// the one in its address bar.
func (s *site) browser() context.Context {
	spki := sha256.Sum256(s.cert.Leaf.RawSubjectPublicKeyInfo)
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.NoSandbox,                           // the tests run as root
		chromedp.Flag("disable-dev-shm-usage", true), // which is small in containers
		chromedp.UserDataDir(s.t.TempDir()),
		chromedp.Flag("ignore-certificate-errors-spki-list", base64.StdEncoding.EncodeToString(spki[:])),
		chromedp.Flag("host-resolver-rules", "MAP *.example 127.0.0.1"),
		chromedp.Flag("test-third-party-cookie-phaseout", true),
	)
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*patience)
	s.t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx, options...)
	s.t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	s.t.Cleanup(cancel)
	return ctx
}

// grpcCommon is a service without a schema: whatever comes is sent back, in each of the
// forms that gRPC has.
const grpcCommon = `
const grpc = require('@grpc/grpc-js')
const same = (b) => b
const method = (name, requestStream, responseStream) => ({ path: '/echo.Echo/' + name, requestStream, responseStream,
  requestSerialize: same, requestDeserialize: same, responseSerialize: same, responseDeserialize: same })
module.exports = { grpc, Echo: { One: method('One', false, false), Both: method('Both', true, true) } }
`

func grpc(s *site) {
	dir := npm(s, map[string]string{
		"package.json": `{"private": true, "dependencies": {"@grpc/grpc-js": "1.14.3"}}`,
		"common.js":    grpcCommon,
		"server.js": `const { grpc, Echo } = require('./common')
const server = new grpc.Server()
server.addService(Echo, {
  One: (call, done) => done(call.request.length ? null : { code: grpc.status.NOT_FOUND, details: 'nothing' }, call.request),
  Both: (call) => { call.on('data', (b) => call.write(b)); call.on('end', () => call.end()) },
})
server.bindAsync('0.0.0.0:50051', grpc.ServerCredentials.createInsecure(), (err) => { if (err) throw err; console.log('ready') })
`,
		"client.js": `const { grpc, Echo } = require('./common')
const [address, authority, key, certificate] = process.argv.slice(2)
const Client = grpc.makeGenericClientConstructor(Echo)
const client = new Client(address, grpc.credentials.createSsl(require('fs').readFileSync(certificate)),
  { 'grpc.default_authority': authority, 'grpc.ssl_target_name_override': authority.split(':')[0] })
const credential = new grpc.Metadata()
credential.set('x-api-key', key)
const one = (text) => new Promise((done) => client.One(Buffer.from(text), credential, (err, answer) => done(err ? err.code + ' ' + err.details : answer.toString())))
const both = (n) => new Promise((done, fail) => {
  const call = client.Both(credential)
  let got = 0
  call.on('data', () => { if (++got < n) call.write(Buffer.from('next')); else call.end() }) // each after the answer to the one before
  call.on('end', () => done(got)); call.on('error', fail)
  call.write(Buffer.from('first'))
})
;(async () => { console.log(await one('well'), '|', await one(''), '|', await both(50)); client.close() })()
`,
	})
	id := s.capsule("512")
	s.nestbox("cp", "-r", dir, id+":/root")
	s.nestbox("exec", "-d", "--tag", "grpc", "-w", "/root/project", id, "--", "node", "server.js")
	require.Eventually(s.t, func() bool { return strings.Contains(s.nestbox("logs", id, "grpc"), "ready") }, patience, 100*time.Millisecond)
	_, port, err := net.SplitHostPort(s.addr)
	require.NoError(s.t, err)
	require.Equal(s.t, "well | 5 nothing | 50",
		s.run(dir, "node", "client.js", s.addr, "50051-"+id+"."+domain+":"+port, s.key, s.pem))
}
