//! Several daemons on the loopback interface: making a cluster, joining it, losing and finding nodes, and what strangers
//! and broken peers can do to it (nothing).

mod common;

use std::time::Duration;

use common::{TestCluster, TestNode, eventually};
use runtime::cluster::state::NodeStatus;
use runtime::control::FailureKind;
use runtime::job_id::JobId;

fn status_of(node: &TestNode, number: u32) -> Option<NodeStatus> {
    node.nodes()
        .into_iter()
        .find(|n| n.number == number)
        .map(|n| n.status)
}

#[test]
fn three_nodes_find_lose_and_find_each_other() {
    let mut cluster = TestCluster::of(3);
    for node in &cluster.nodes {
        eventually("everybody is up, with a load", || {
            let nodes = node.nodes();
            nodes.len() == 3
                && nodes
                    .iter()
                    .all(|n| n.status == NodeStatus::Alive && n.load.is_some())
        });
        let names: Vec<_> = node.nodes().into_iter().map(|n| n.name).collect();
        assert_eq!(names, ["n1", "n2", "n3"]);
    }

    cluster.nodes[2].kill();
    for node in &cluster.nodes[..2] {
        eventually("a killed node is down", || {
            status_of(node, 3) == Some(NodeStatus::Down)
        });
    }
    cluster.nodes[2].start();
    for node in &cluster.nodes {
        eventually("it is back", || {
            (1..=3).all(|n| status_of(node, n) == Some(NodeStatus::Alive))
        });
    }

    cluster.nodes[1].terminate();
    for node in [&cluster.nodes[0], &cluster.nodes[2]] {
        eventually("a node that ends is down", || {
            status_of(node, 2) == Some(NodeStatus::Down)
        });
    }

    // the others were remembered: node 2 comes back while the one it joined through is away
    cluster.nodes[0].terminate();
    cluster.nodes[1].start();
    eventually("it finds node 3 by itself", || {
        status_of(&cluster.nodes[1], 3) == Some(NodeStatus::Alive)
    });
}

#[test]
fn an_invitation_is_good_once_and_for_its_cluster() {
    let cluster = TestCluster::of(1);
    let first = &cluster.nodes[0];
    let token = first.invite(&[]);
    let two = TestNode::new("n2");
    two.join(&token).assert_ok();
    let three = TestNode::new("n3");
    three.join(&token).assert_fails("used already, by n2");
    three
        .join(&token[..token.len() - 4])
        .assert_fails("incomplete or damaged");
    three.join("hello").assert_fails("mosctl cluster invite");

    let same_name = TestNode::new("n2");
    let another = first.invite(&[]);
    same_name.join(&another).assert_fails("has the name n2 already");
    // a refusal for such a reason has not spent it
    three.join(&another).assert_ok();
    three
        .join(&first.invite(&[]))
        .assert_fails("node 3 (n3) of cluster test already");

    let expired = first.invite(&["--expires", "1s"]);
    let late = TestNode::new("n4");
    std::thread::sleep(Duration::from_millis(2100));
    late.join(&expired).assert_fails("expired");

    // an invitation of this cluster that leads to another one
    let others = TestCluster::of(1);
    let astray = first.invite(&["--address", &others.nodes[0].addr.to_string()]);
    late.join(&astray).assert_fails("another cluster");
    // nobody there
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let nowhere = first.invite(&["--address", &silent.local_addr().unwrap().to_string()]);
    late.join(&nowhere).assert_fails("is mosd running there");
    assert!(!late.dir.path().join("state/node.pem").exists());
    // only the node with the key can invite
    two.mosctl(&["cluster", "invite"])
        .assert_fails("where the cluster was made");
}

#[test]
fn a_node_of_another_cluster_gets_nothing() {
    let ours = TestCluster::of(2);
    let mut theirs = TestCluster::of(1);
    let stranger = &mut theirs.nodes[0];
    stranger.terminate();
    // it takes our node for one of its own
    stranger.remember(2, "n2", ours.nodes[1].addr);
    stranger.start();
    let failure = stranger.request_supervisor(2).unwrap_err();
    assert_eq!(failure.kind, FailureKind::NodeDown);
    assert!(failure.text.contains("another cluster"), "{failure}");
    assert_eq!(status_of(stranger, 2), Some(NodeStatus::Down));
    eventually("the refusal is in our log", || {
        ours.nodes[1].log().contains("refused")
    });
    assert_eq!(ours.nodes[1].nodes().len(), 2);
    assert_eq!(ours.nodes[1].status().supervisors, []);
}

#[test]
fn unknown_and_dead_nodes_are_told_apart() {
    let mut cluster = TestCluster::of(2);
    let failure = cluster.nodes[0].request_supervisor(9).unwrap_err();
    assert_eq!(failure.kind, FailureKind::UnknownNode);
    cluster.nodes[1].kill();
    let failure = cluster.nodes[0].request_supervisor(2).unwrap_err();
    assert_eq!(failure.kind, FailureKind::NodeDown);
    assert!(failure.text.contains("node 2 (n2) does not answer"), "{failure}");
}

/// Names of the threads of a process that have no filter of system calls.
fn unconfined(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut names: Vec<String> = tasks
        .map(|t| t.unwrap().path())
        .filter(|t| {
            let status = std::fs::read_to_string(t.join("status")).unwrap();
            !status.lines().any(|l| l == "Seccomp:\t2")
        })
        .map(|t| std::fs::read_to_string(t.join("comm")).unwrap().trim().to_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn daemons_and_supervisors_are_confined() {
    let cluster = TestCluster::of(2);
    let placement = cluster.nodes[0].request_supervisor(2).unwrap();
    assert_eq!(unconfined(cluster.nodes[1].pid()), ["spawner"]);
    // A thread gives itself its name, some time after its start.
    eventually("only the tracer is free", || {
        unconfined(placement.pid) == ["tracer"]
    });
    common::kill_pid(placement.pid);
}

#[test]
fn a_supervisor_listens_where_its_home_came_and_outlives_the_daemon() {
    let mut cluster = TestCluster::of(2);
    let placement = cluster.nodes[0].request_supervisor(2).unwrap();
    assert_eq!(placement.addr.ip(), cluster.nodes[1].addr.ip());
    let hosted = cluster.nodes[1].status().supervisors;
    assert_eq!(
        hosted.iter().map(|h| (h.pid, h.job.home)).collect::<Vec<_>>(),
        [(placement.pid, 1)]
    );
    let alive = || std::path::Path::new(&format!("/proc/{}/exe", placement.pid)).exists();
    cluster.nodes[1].terminate();
    assert!(alive());
    cluster.nodes[1].start();
    assert!(alive());
    assert_eq!(cluster.nodes[1].status().supervisors, hosted);
    common::kill_pid(placement.pid);
    eventually("its end is noticed", || {
        cluster.nodes[1].status().supervisors.is_empty()
    });
    // on this node itself there can be one, too
    let here = cluster.nodes[1].request_supervisor(2).unwrap();
    assert!(here.addr.ip().is_loopback());
    common::kill_pid(here.pid);
}

#[test]
fn a_node_may_be_closed_to_guests() {
    let mut cluster = TestCluster::of(2);
    cluster.nodes[1].terminate();
    cluster.nodes[1].configure("[guests]\naccept = \"none\"\n");
    cluster.nodes[1].start();
    eventually("it says so", || {
        cluster.nodes[0]
            .nodes()
            .iter()
            .any(|n| n.number == 2 && n.load.is_some_and(|l| !l.admits))
    });
    let failure = cluster.nodes[0].request_supervisor(2).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Refused);
    assert!(failure.text.contains("guests.accept"), "{failure}");
    // a job whose home is elsewhere than it says
    let request = runtime::control::SupervisorRequest {
        node: 1,
        job: JobId {
            home: 77,
            deputy_pid: 1,
            nonce: 0,
        },
        peer_fingerprint: [0; 32],
    };
    let placement = cluster.nodes[0].client().request_supervisor(request).unwrap();
    assert_eq!(cluster.nodes[0].status().supervisors[0].job.home, 1);
    common::kill_pid(placement.pid);
}
