//! Page stores as the daemon keeps them.

mod common;

use std::os::unix::fs::MetadataExt;

use common::{TestCluster, eventually, kill_pid};

#[test]
fn a_daemon_makes_them_counts_them_and_removes_them_when_they_are_not_wanted() {
    let mut cluster = TestCluster::of(2);
    let uid = nix::unistd::geteuid().as_raw().to_string();
    let dir = cluster.nodes[1].dir.path().join("store");
    let supervisor = cluster.nodes[0].request_supervisor(2).unwrap();
    let users = dir.join(uid);
    assert_eq!(users.metadata().unwrap().mode() & 0o777, 0o700);
    eventually("the supervisor to open it", || users.join("counts").exists());
    let counted = |cluster: &TestCluster| -> Vec<u32> {
        let stores = cluster.nodes[0].status().page_stores;
        stores.iter().map(|s| s.node).collect()
    };
    eventually("both nodes to tell", || counted(&cluster) == [1, 2]);
    kill_pid(supervisor.pid);
    let node = &mut cluster.nodes[1];
    node.terminate();
    node.configure("limit = \"0\"\n");
    node.start();
    assert!(!users.exists() && dir.exists());
    // There is none any more, and jobs are taken all the same.
    eventually("a supervisor", || {
        let again = cluster.nodes[0].request_supervisor(2);
        again.is_ok_and(|supervisor| {
            kill_pid(supervisor.pid);
            true
        })
    });
    assert!(!users.exists());
}
