//! The metadata service from the host's side: the API, the flags, the configuration file. What the
//! guest sees is tested with Linux, and without KVM in `devices`.
use serde_json::{Value, json};

use crate::api::boot_source;
use crate::util::*;

const UNINITIALIZED: &str = "The MMDS data store is not initialized.";
const TOO_LARGE: &str = "The MMDS patch request doesn't fit.";

fn interface(id: &str) -> Value {
    json!({"iface_id": id, "host_dev_name": "tap0"})
}

#[test]
fn data_can_be_changed_at_any_time() {
    let vm = Husk::api().start();
    let api = vm.api();
    assert_eq!(api.get("/mmds").json(), json!({}));
    assert_eq!(api.patch("/mmds", json!({"a": 1})).fault(), UNINITIALIZED);
    assert!(api.put("/mmds", "{").fault().contains("EOF"));
    assert_eq!(api.put("/mmds", "").fault(), "Empty PUT request.");
    api.put("/mmds", json!({"a": {"b": "c", "d": [1]}, "secret": "hush-hush"})).done();
    api.patch("/mmds", json!({"a": {"b": null, "e": {}}})).done();
    let data = json!({"a": {"d": [1], "e": {}}, "secret": "hush-hush"});
    assert_eq!(api.get("/mmds").json(), data);

    api.put("/boot-source", boot_source("hello", "how=hang")).done();
    api.act("InstanceStart").done();
    vm.expect("how=hang");
    assert_eq!(api.get("/mmds").json(), data);
    api.patch("/mmds", json!({"secret": "hush-hush-hush"})).done();
    assert_eq!(api.get("/mmds").json()["secret"], "hush-hush-hush");
    // The data are nobody's configuration.
    let config = api.get("/vm/config").json();
    assert_eq!(config["mmds-config"], Value::Null);
    assert!(!config.to_string().contains("hush"));

    api.act("Kill").done();
    let end = vm.wait().code(0);
    assert!(end.errors.contains(r#"a Put request on "/mmds"."#), "{end}");
    assert!(!end.errors.contains("hush"), "{end}");
}

#[test]
fn data_that_do_not_fit_are_refused_with_413() {
    let too_large = |reply: Reply| {
        let fault: Value = serde_json::from_str(&reply.body).unwrap();
        assert_eq!((reply.status, &fault["fault_message"]), (413, &json!(TOO_LARGE)));
    };
    let vm = Husk::api().option("--mmds-size-limit", "20").start();
    let api = vm.api();
    api.put("/mmds", json!({"a": "0123456789"})).done();
    too_large(api.put("/mmds", json!({"a": "0123456789012"})));
    too_large(api.patch("/mmds", json!({"b": "c"})));
    assert_eq!(api.get("/mmds").json(), json!({"a": "0123456789"}));
    // Without a limit of its own it is that of bodies, which is looked at first.
    let vm = Husk::api().option("--max-payload", "20").start();
    let fault = vm.api().put("/mmds", json!({"a": "0123456789012"})).fault();
    assert!(fault.contains("the limit of 20 "), "{fault}");
    vm.api().put("/mmds", json!({"a": "01234567890"})).done();
    too_large(vm.api().patch("/mmds", json!({"b": "c"})));
}

#[test]
fn the_service_is_configured_before_the_start_for_interfaces_that_there_are() {
    let network = Network::with_tap();
    let vm = Husk::api().within(&network).start();
    let api = vm.api();
    let unknown = "The list of network interface IDs provided contains at least one ID that does \
                   not correspond to any existing network interface.";
    let config = json!({"network_interfaces": ["eth0"], "version": "V2"});
    assert_eq!(api.put("/mmds/config", &config).fault(), unknown);
    api.put("/network-interfaces/eth0", interface("eth0")).done();
    for (change, fault) in [
        (json!({"network_interfaces": ["eth0", "eth1"]}), unknown),
        (
            json!({"network_interfaces": []}),
            "The list of network interface IDs that allow forwarding MMDS requests is empty.",
        ),
        (json!({"ipv4_address": "10.0.0.1"}), "The MMDS IPv4 address is not link local."),
    ] {
        let mut changed = config.clone();
        changed.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        assert_eq!(api.put("/mmds/config", changed).fault(), fault);
    }
    for bad in [json!({"network_interfaces": ["eth0"], "version": "V3"}), json!({"version": "V2"})]
    {
        assert!(api.put("/mmds/config", bad).fault().contains("deserializing"));
    }
    let reply = api.put("/mmds/config", json!({"network_interfaces": ["eth0"]}));
    assert!(reply.head.contains("Deprecation: true"), "{}", reply.head);
    vm.expect_error("PUT /mmds/config: V1 is deprecated. Use V2 instead.");
    let reply = api.put("/mmds/config", &config);
    reply.done();
    assert!(!reply.head.contains("Deprecation"), "{}", reply.head);

    api.put("/boot-source", boot_source("hello", "how=hang")).done();
    api.act("InstanceStart").done();
    let fault = api.put("/mmds/config", &config).fault();
    assert_eq!(fault, "The requested operation is not supported after starting the microVM.");
    let mut shown = api.get("/vm/config").json();
    let expected = json!({
        "network_interfaces": ["eth0"], "version": "V2", "ipv4_address": "169.254.169.254",
        "imds_compat": false,
    });
    assert_eq!(shown["mmds-config"], expected);
    api.act("Kill").done();
    vm.wait().code(0);

    // What is shown can be used again, in whatever order, and with data from a file.
    let scratch = Scratch::new();
    shown["serial"] = Value::Null;
    let file = scratch.file("vm.json", shown.to_string());
    let data = scratch.file("data.json", r#"{ "a": "b" }"#);
    let husk = Husk::new(["run", "--config-file"]).arg(file).option("--metadata", data);
    let vm = husk.within(&network).listening().start();
    vm.expect("how=hang");
    assert_eq!(vm.api().get("/vm/config").json()["mmds-config"], expected);
    assert_eq!(vm.api().get("/mmds").json(), json!({"a": "b"}));
    // Without its interface the service is nowhere, and the configuration as good as before.
    vm.api().delete("/network-interfaces/eth0").done();
    assert_eq!(vm.api().get("/vm/config").json()["mmds-config"], Value::Null);
    vm.api().act("Kill").done();
    let end = vm.wait().code(0);
    assert!(end.errors.contains("Successfully added metadata to mmds from file"), "{end}");
}

#[test]
fn metadata_from_a_file_must_be_json_that_fits() {
    let scratch = Scratch::new();
    let husk = || Husk::new(["run", "--metadata"]);
    let line = husk().arg(scratch.path("none")).wait().quickly().refused(3);
    assert!(line.contains("none"), "{line}");
    let bad = scratch.file("bad.json", "{\n\"a\": }");
    let line = husk().arg(&bad).wait().quickly().refused(3);
    assert!(line.contains("bad.json") && line.contains("at line 2 column 6"), "{line}");
    let large = scratch.file("large.json", json!({"a": "x".repeat(100)}).to_string());
    let line = husk().arg(&large).option("--mmds-size-limit", "100").wait().quickly().refused(3);
    assert!(line.contains(TOO_LARGE), "{line}");
    let line = husk()
        .arg(&large)
        .option("--net", "tap=a,mmds=V1")
        .option("--net", "tap=b,mmds")
        .wait()
        .quickly();
    assert!(!line.status.success());
}

#[test]
fn firecrackers_flag_takes_metadata() {
    let scratch = Scratch::new();
    let (socket, data) = (scratch.path("api.sock"), scratch.file("data.json", r#"{"a": "b"}"#));
    let vm = Husk::firecracker(["--api-sock"])
        .arg(&socket)
        .option("--metadata", data)
        .option("--http-api-max-payload-size", "20")
        .start();
    vm.expect("Successfully added metadata to mmds from file");
    vm.expect("API server started");
    let api = Api::new(&socket);
    assert_eq!(api.get("/mmds").json(), json!({"a": "b"}));
    assert_eq!(api.patch("/mmds", json!({"b": "c"})).status, 204);
    assert_eq!(api.patch("/mmds", json!({"c": "d"})).status, 413);
    vm.signal(Signal::TERM);
    vm.wait().code(143);
}
