//! Tests in a network namespace of their own: the test binary starts itself again there, for one test.

use std::process::Command;

const VARIABLE: &str = "FEALTY_TEST_NAMESPACE";

/// Runs `body` in a fresh network namespace. `test` is the calling test's own name.
#[track_caller]
pub(crate) fn in_namespace(test: &str, body: impl FnOnce()) {
    if std::env::var(VARIABLE).is_ok_and(|inside| inside == test) {
        // No frames but the test's own.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        return body();
    }
    let mut command = Command::new("unshare");
    // Whoever is not root becomes it in a user namespace.
    command.args(if rustix::process::geteuid().is_root() { &["-n"][..] } else { &["-r", "-n"] });
    command.args(["--kill-child", "-f", "--"]).arg(std::env::current_exe().expect("own path"));
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(VARIABLE, test);
    let ended = command.output().expect("unshare of util-linux");
    let text = [ended.stdout, ended.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(ended.status.success() && text.contains("1 passed"), "{text}");
}

/// Makes a TAP that is up.
pub(crate) fn make_tap(name: &str, more: &[&str]) {
    ip(&[&["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"], more].concat());
    ip(&["link", "set", name, "up"]);
}

/// Runs `ip` of iproute2.
pub(crate) fn ip(words: &[&str]) {
    let ended = Command::new("ip").args(words).output().expect("ip of iproute2");
    assert!(ended.status.success(), "ip {words:?}: {}", String::from_utf8_lossy(&ended.stderr));
}
