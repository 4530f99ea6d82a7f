//! What is sent to a daemon by those who mean it no good, or are broken: nothing of it may hurt the daemon or anybody
//! else.

mod common;

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use common::{MOSD, TestCluster, TestNode, eventually};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use runtime::cluster::gossip::GossipId;
use runtime::cluster::protocol::{
    Introduction, JoinAnswer, JoinRequest, Offer, PeerAnswer, PeerRequest, RemoteSupervisor, Verdict,
};
use runtime::cluster::state::NodeStatus;
use runtime::cluster::store::Credentials;
use runtime::cluster::tls;
use runtime::cluster::token::{InviteId, InviteSecret};
use runtime::control::FailureKind;
use runtime::daemon::frames;
use runtime::job_id::JobId;

const LIMIT: Duration = Duration::from_secs(20);

async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future)
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"))
}

fn endpoint() -> Endpoint {
    Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap()
}

async fn connect(endpoint: &Endpoint, credentials: &Credentials, to: &TestNode) -> Connection {
    let config = tls::control_client_config(credentials).unwrap();
    let connecting = endpoint.connect_with(config, to.addr, tls::SERVER_NAME).unwrap();
    soon("connection", connecting).await.unwrap()
}

fn introduction(number: u32, name: &str, endpoint: &Endpoint) -> Introduction {
    let addr = endpoint.local_addr().unwrap();
    let id = GossipId {
        number,
        generation: 1,
        addr,
        name: name.into(),
        host: String::new(),
    };
    Introduction {
        id,
        software: "test".into(),
        members: Vec::new(),
    }
}

async fn offer(connection: &Connection, offer: Offer) -> (SendStream, RecvStream, [u8; Verdict::LEN]) {
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(&offer.encode()).await.unwrap();
    let mut verdict = [0; Verdict::LEN];
    soon("verdict", receive.read_exact(&mut verdict)).await.unwrap();
    (send, receive, verdict)
}

async fn introduce(connection: &Connection, ours: &Introduction) {
    let (mut send, mut receive, verdict) = offer(connection, Offer::OURS).await;
    Verdict::decode(&verdict, Offer::OURS).unwrap();
    frames::write(&mut send, ours).await.unwrap();
    let _: Introduction = soon("introduction", frames::read(&mut receive, 1 << 20))
        .await
        .unwrap();
}

/// A running node 1, and the credentials of a node 2 that this test plays.
fn one_and_a_rogue() -> (TestCluster, Credentials) {
    let cluster = TestCluster::of(1);
    let rogue = cluster.nodes[0].state().make_node("rogue").unwrap();
    (cluster, rogue)
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_and_without_a_certificate() {
    let cluster = TestCluster::of(2);
    let node = &cluster.nodes[0];
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for len in [0, 1, 20, 1200, 1472, 60_000] {
        let noise: Vec<u8> = (0..len).map(|_| rand::random()).collect();
        socket.send_to(&noise, node.addr).unwrap();
        let mut initial = noise.clone();
        // looks like the first packet of a connection
        initial.splice(0..initial.len().min(5), [0xc3, 0, 0, 0, 1]);
        socket.send_to(&initial, node.addr).unwrap();
    }

    // somebody who has no certificate is asked for one, and gets nothing
    let endpoint = endpoint();
    let fingerprint = node.state().credentials().unwrap().fingerprint();
    let join = |endpoint: &Endpoint| {
        let config = tls::join_client_config(fingerprint).unwrap();
        endpoint
            .connect_with(config, node.addr, tls::SERVER_NAME)
            .unwrap()
    };
    for message in [&[0xff; 64][..], &[3, 0, 0, 0, 1, 2, 3], &Offer::OURS.encode()] {
        let connection = soon("connection", join(&endpoint)).await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(message).await.unwrap();
        let _ = send.finish();
        soon("the daemon hangs up", connection.closed()).await;
    }
    // a join with an invitation that nobody made
    let connection = soon("connection", join(&endpoint)).await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let request = JoinRequest {
        id: InviteId([1; 8]),
        secret: InviteSecret([2; 32]),
        name: "x".repeat(9000),
        host: "\x1b".repeat(100),
        public_key: vec![1; 500],
        port: 1,
    };
    frames::write(&mut send, &request).await.unwrap();
    let answer: JoinAnswer = soon("answer", frames::read(&mut receive, 1 << 20)).await.unwrap();
    assert!(matches!(answer, JoinAnswer::Refused(why) if why.contains("knows no such invitation")));

    assert_eq!(node.nodes().len(), 2);
    eventually("the other node never went away", || {
        node.nodes()[1].status == NodeStatus::Alive
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_has_gone_mad() {
    let (cluster, rogue) = one_and_a_rogue();
    let node = &cluster.nodes[0];
    let endpoint = endpoint();

    // wrong first words
    for bytes in [&[0xff; 32][..], &[0; 8]] {
        let connection = connect(&endpoint, &rogue, node).await;
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        soon("the daemon hangs up", connection.closed()).await;
    }
    // the name of somebody else
    let connection = connect(&endpoint, &rogue, node).await;
    let (mut send, _receive, _) = offer(&connection, Offer::OURS).await;
    frames::write(&mut send, &introduction(1, "n1", &endpoint))
        .await
        .unwrap();
    soon("the daemon hangs up", connection.closed()).await;
    // an introduction that is announced as 4 GiB
    let connection = connect(&endpoint, &rogue, node).await;
    let (mut send, _receive, _) = offer(&connection, Offer::OURS).await;
    send.write_all(&[0xff; 64]).await.unwrap();
    soon("the daemon hangs up", connection.closed()).await;

    // a proper beginning, then nonsense in every place where something is read
    let connection = connect(&endpoint, &rogue, node).await;
    introduce(&connection, &introduction(2, "rogue", &endpoint)).await;
    for datagram in [
        &b""[..],
        &[0],
        &[0xff; 100],
        &[0, 1, 2, 3],
        &[1, 0xff, 0xff, 0xff, 0xff],
        &[0; 1000],
    ] {
        connection
            .send_datagram(Bytes::copy_from_slice(datagram))
            .unwrap();
    }
    for request in [
        &[0xff; 4][..],
        &[0, 0, 16, 0, 1],
        &[9, 0, 0, 0, 200, 1, 1, 1, 1, 1, 1, 1, 1],
        &[1],
    ] {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(request).await.unwrap();
        let _ = send.finish();
        let answer: PeerAnswer = soon("answer", frames::read(&mut receive, 1 << 20)).await.unwrap();
        assert!(matches!(answer, PeerAnswer::Failed(f) if f.kind == FailureKind::Protocol));
    }
    // somebody else's job
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let wanted = RemoteSupervisor {
        job: JobId {
            home: 1,
            deputy_pid: 1,
            nonce: 1,
        },
        uid: 0,
        gid: 0,
        groups: vec![0; 70_000],
        peer_fingerprint: [0; 32],
    };
    frames::write(&mut send, &PeerRequest::Supervisor(wanted))
        .await
        .unwrap();
    let answer: PeerAnswer = soon("answer", frames::read(&mut receive, 1 << 20)).await.unwrap();
    assert!(matches!(answer, PeerAnswer::Failed(f) if f.text.contains("its own jobs")));
    // the connection has survived all that
    assert!(connection.close_reason().is_none());
    assert_eq!(node.status().supervisors, []);
    assert_eq!(node.nodes()[0].status, NodeStatus::Alive);
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_that_do_not_fit_are_said_on_both_sides() {
    let (mut cluster, rogue) = one_and_a_rogue();
    let node = &cluster.nodes[0];
    let client = endpoint();
    let connection = connect(&client, &rogue, node).await;
    let future = Offer { min: 7, max: 9 };
    let (_send, _receive, verdict) = offer(&connection, future).await;
    let error = Verdict::decode(&verdict, future).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("versions 1 to 1 of the control protocol, we speak 7 to 9"),
        "{error}"
    );
    eventually("it is in the log", || {
        node.log().contains("it speaks versions 7 to 9")
    });

    // the other way round: the daemon dials somebody from the future
    let config = tls::server_config(&rogue).unwrap();
    let server = Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = server.local_addr().unwrap();
    tokio::spawn(async move {
        while let Some(incoming) = server.accept().await {
            tokio::spawn(async move {
                let connection = incoming.await.unwrap();
                let (mut send, mut receive) = connection.accept_bi().await.unwrap();
                let mut theirs = [0; Offer::LEN];
                receive.read_exact(&mut theirs).await.unwrap();
                let verdict = future.answer(Offer::decode(&theirs).unwrap());
                send.write_all(&verdict.encode()).await.unwrap();
                connection.closed().await;
            });
        }
    });
    let failure = tokio::task::spawn_blocking(move || {
        let node = &mut cluster.nodes[0];
        node.terminate();
        node.remember(2, "rogue", addr);
        node.start();
        node.request_supervisor(2).unwrap_err()
    });
    let failure = soon("refusal", failure).await.unwrap();
    assert_eq!(failure.kind, FailureKind::Protocol);
    assert!(
        failure.text.contains("install the same version of mosd"),
        "{failure}"
    );
}

#[test]
fn garbage_on_the_control_socket() {
    let cluster = TestCluster::of(1);
    let node = &cluster.nodes[0];
    let path = node.rundir().join("mosd.sock");
    let preamble = [&b"MOSd"[..], &[1, 0]].concat();
    for bytes in [
        vec![],
        b"GET / HTTP/1.1\r\n".to_vec(),
        preamble.clone(),
        [&preamble[..], &[0xff; 100]].concat(),
        [&preamble[..], &[4, 0, 0, 0, 99, 99, 99, 99]].concat(),
        [&preamble[..], &[4, 0]].concat(),
    ] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }
    // one who says nothing blocks nobody
    let _silent: Vec<_> = (0..20).map(|_| UnixStream::connect(&path).unwrap()).collect();
    assert_eq!(node.nodes().len(), 1);
    // another version is answered with ours
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"MOSd\x63\x00").unwrap();
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, &preamble[..]);
}

#[test]
fn mistakes_of_the_administrator_are_named() {
    let mut node = TestNode::new("n1");
    let mosd = |node: &TestNode, more: &[&str]| {
        let mut command = Command::new(MOSD);
        command
            .arg("--config")
            .arg(node.config())
            .args(more)
            .env_remove("MOSRUN_RUNDIR")
            .stdin(Stdio::null());
        common::Done(command.output().unwrap())
    };
    for mode in [&[][..], &["--foreground"]] {
        mosd(&node, mode).assert_fails("mosctl cluster init");
    }
    node.configure("[guests]\nnise = 3\n");
    let done = mosd(&node, &[]);
    done.assert_fails("unknown field `nise`");
    assert_eq!(done.0.status.code(), Some(2));
    assert!(done.stderr().contains("mosd.toml:14: "), "{}", done.stderr());
    node.mosctl(&["cluster", "invite"]).assert_fails("mosd.toml:14: ");
    node.configure("");
    assert!(
        mosd(&node, &["--check-config"])
            .assert_ok()
            .stdout()
            .contains("good")
    );
    let missing = Command::new(MOSD)
        .args(["--config", "/nonexistent/x.toml"])
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(2));

    node.mosctl(&["cluster", "init", "--name", "two words"])
        .assert_fails("cannot be a name");
    node.mosctl(&["cluster", "init", "--node-name", "n1"]).assert_ok();
    node.mosctl(&["cluster", "init"])
        .assert_fails("node 1 (n1) of cluster mosrun already");
    node.mosctl(&["cluster", "invite", "--address", "0.0.0.0:1"])
        .assert_fails("nobody can dial");
    let early = node.mosctl(&["cluster", "invite"]);
    assert!(
        early
            .assert_ok()
            .stderr()
            .contains("mosd of this node does not run")
    );
    node.mosctl(&["status"]).assert_fails("no mosd runs here");
    node.mosctl(&["migrate", "1", "home"])
        .assert_fails("belongs to no job");

    node.start();
    mosd(&node, &["--foreground"]).assert_fails("another mosd serves");
    let second = TestNode::new("n2");
    std::fs::create_dir(second.path().join("state")).unwrap();
    second
        .state()
        .save_credentials(&node.state().make_node("n2").unwrap())
        .unwrap();
    let text = std::fs::read_to_string(second.config()).unwrap();
    std::fs::write(
        second.config(),
        text.replace(&second.addr.to_string(), &node.addr.to_string()),
    )
    .unwrap();
    mosd(&second, &["--foreground"]).assert_fails("cannot listen on");
    std::fs::create_dir_all(second.rundir()).unwrap();
    std::fs::set_permissions(second.rundir(), std::fs::Permissions::from_mode(0o777)).unwrap();
    mosd(&second, &["--foreground"]).assert_fails("others may write to it");

    let status = node.mosctl(&["status", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&status.assert_ok().stdout()).unwrap();
    assert_eq!(
        (&value["daemon"]["node"], &value["jobs"]),
        (&1.into(), &serde_json::json!([]))
    );
    assert_eq!(value["totals"]["cache_hits"], 0);
    assert!(
        node.mosctl(&["status"])
            .assert_ok()
            .stdout()
            .contains("n1 (here)")
    );
    assert!(
        node.mosctl(&["mon", "--once"])
            .assert_ok()
            .stdout()
            .contains("n1 (here)")
    );
    assert_eq!(node.mosctl(&["ps", "--json"]).assert_ok().stdout().trim(), "[]");
}

#[test]
fn in_the_background_the_command_returns_when_the_daemon_serves() {
    let node = TestNode::new("n1");
    node.mosctl(&["cluster", "init", "--node-name", "n1"]).assert_ok();
    let mut command = Command::new(MOSD);
    command
        .arg("--config")
        .arg(node.config())
        .env_remove("MOSRUN_RUNDIR")
        .stdin(Stdio::null());
    // output() waits for the ends of the pipes: the daemon must not hold them
    common::Done(command.output().unwrap()).assert_ok();
    let status = node.status();
    assert_eq!(status.node, 1);
    let again = common::Done(command.output().unwrap());
    again.assert_fails("another mosd serves");
    let link = std::fs::read_link(format!("/proc/{}/cwd", status.pid)).unwrap();
    assert_eq!(link, std::path::Path::new("/"));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(status.pid as i32),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    eventually("it ends and takes its socket along", || {
        !node.rundir().join("mosd.sock").exists()
    });
    assert!(node.path().join("state/mosd.log").exists());
}
